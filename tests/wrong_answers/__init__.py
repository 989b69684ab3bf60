"""Answers that the checks must reject, with the complaint each must provoke, and answers they must accept.

One module per notebook (`nb02.py`), read by tests/test_checks_reject_wrong.py, with two tables:

    WRONG = {
        "2.3": [
            (forgets_the_last_chunk, r"rank 1: .* is .*, expected"),   # (answer, regular expression)
        ],
    }
    RIGHT = {
        "2.3": [with_isend, with_a_loop_over_halves],   # answers written differently from the solution
    }

An answer is what the reader hands to `check("2.3", answer)`: mostly a function of this module (the ranks can
import it, since the tests' sys.path is passed on). The expression is searched, with re.search, in the words
that the reader sees. An answer that hangs or raises is a row like any other: the complaint is then that of the
ranks ("waits in recv") or of the function ("your function raised IndexError").

Each registered exercise needs at least two wrong answers and one right one; the solution from
workshop_utils/exercises.json must pass and its stub must be "not solved yet" as well, without a row.
Write the mistakes that people make: no division, division on one rank only, an off-by-one chunk, the input
returned as it came, the right value only when the world size is a power of two, one message too many.
"""
