"""Text: where it comes from, its tokens, its windows, and the chat template around it."""
