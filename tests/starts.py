"""How many vLLM engines this process of pytest has started, in processes of their own; conftest.py tells at the end."""

engines = 0
