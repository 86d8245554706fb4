"""Published weights: how they are read into our models, and written from them."""
