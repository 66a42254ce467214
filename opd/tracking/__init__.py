"""Where numbers go: run files, the terminal, Weights & Biases; and the reports read from them."""
