"""The sweep over the model zoo: `python -m benchmarks.zoo`, or `make zoo`.

For every model family of timm and every torchvision model of the kinds that hold residual blocks:
is it traced, what is found, does the retrofit keep its promises, and are sites and rates those that
the authors of the network chose? The last question is answered by an oracle that nobody here wrote:
the same network built with its own drop path.

    catalogue  which models, and how each is built with and without its native drop path
    oracle     the adds that a network drops by itself, against the sites that are found without
    checks     everything that is asked of one model, as one row of plain data
    sweep      the rows of all models, each in a process of its own
    page       rows as docs/zoo.md
    reasons    why single models differ, found by reading their sources
"""
