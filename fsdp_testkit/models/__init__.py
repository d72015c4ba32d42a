"""The catalogue of causal LMs: tiny configs by rule, models, batches."""
