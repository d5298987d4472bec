"""generative-image-to-text: a vision encoder, a mapper and a language model, glued and trained."""
