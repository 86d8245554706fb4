"""TFDS builders of our own: all of them prepare without TensorFlow."""
