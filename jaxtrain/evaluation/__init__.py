"""How good a model is: scores, the report, and the worst answers as pictures."""
