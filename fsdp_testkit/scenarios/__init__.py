"""What ranks run: each scenario drives a backend (or an oracle) and returns evidence, never a judgement."""
