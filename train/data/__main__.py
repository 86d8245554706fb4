"""`python -m train.data`."""

from train.data import main

main()
