"""The engine "cudnn": convolutions by graphs of cuDNN's, activation included."""
