"""Decoder maths: blocks and hidden states in, hidden states out."""
