"""Results -> figures and self-contained HTML pages: plain JSON values in, text out; imports nothing else of ours."""
