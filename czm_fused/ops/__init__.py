"""The operators: schemas, backend choice and kernels, one module an operator."""
