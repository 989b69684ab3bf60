"""`%reveal` and `%catchup`. Importing `workshop_utils` in a notebook registers them; what they do is loaded on first use."""


def reveal(line: str) -> None:
    """Put a solution into the next cell: `%reveal`, `%reveal 2.3`, `%reveal 2.3 5` (its first 5 lines)."""
    from workshop_utils.teaching.reveal import reveal_next

    reveal_next(line)


def catchup(line: str) -> None:
    """Bring this kernel to the start of a section: `%catchup 04.3`. `%catchup 04` lists the sections."""
    from workshop_utils.teaching.catchup import catch_up

    catch_up(line)


def register(shell) -> None:
    for magic in (reveal, catchup):
        shell.register_magic_function(magic, magic_kind="line")
