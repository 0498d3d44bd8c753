"""The tests mirror the package; what several of them need lies in support/."""
