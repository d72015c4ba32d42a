"""What is judged: pure functions from evidence to a `Verdict`, one file a family. Starts no process."""
