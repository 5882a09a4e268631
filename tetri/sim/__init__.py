"""The simulator: the live cores and policies in virtual time, and the paper's evaluation reproduced with them."""
