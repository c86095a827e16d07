"""`tandemkv demo`: a question whose answer lies far back, and speeds beside stock transformers."""
