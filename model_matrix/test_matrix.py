"""Every causal LM of transformers through every test of the kit, one class per model.

    pytest -n 4 model_matrix                            # all models
    pytest model_matrix --fsdp-models headline          # the twenty of every change
    pytest model_matrix --fsdp-models llama,mixtral
    pytest model_matrix -k "llama and hsdp"

Known failures are in ``known_failures.toml``, which the ini key ``fsdp_ledger`` names.
"""

from fsdp_testkit import ModelMatrix

matrix = ModelMatrix()
