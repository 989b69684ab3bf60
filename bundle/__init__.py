"""A bundle: one folder with all that the workshop needs in a room without a network.

    README.txt    in plain words
    SHA256SUMS    of every other file, as `sha256sum -c` reads it; written last
    bundle.json   which wheels belong to which system and Python
    wheels/       for Linux (also inside WSL) and macOS
    workshop/     this repository's files
    data/         MNIST/raw/..., as torchvision keeps it
    model/        SmolLM2-135M-Instruct, as `make fetch` keeps it
    slides/       the decks, where they were built

`make bundle` writes it (make.py, wheels.py); `make setup BUNDLE=folder` reads it (folder.py, unpack.py).
"""
