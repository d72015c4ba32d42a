"""From a test's name to result rows: cases, truth, jobs, checks, the fp64 re-run, the ledger."""
