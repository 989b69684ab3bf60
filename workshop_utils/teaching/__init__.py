"""For those who teach the notebooks, and for latecomers.

`magics` makes `%reveal` and `%catchup` known; `reveal` puts a solution into the next cell, `catchup` brings a kernel to
the start of any section, `fonts` enlarges everything for the back of a room, `cheatsheet` is a page with the formulas.
"""
