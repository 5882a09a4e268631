"""Makes the helper modules of this folder importable (`import live`) from every test below it."""
