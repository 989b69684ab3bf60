# %% [markdown]
# # 09 · A template
#
# **The one question that this notebook answers?**
#
# After this notebook you can
#
# - say what is common to all ranks after an `all_reduce`, and what is not;
# - (two or three things that a reader can do, not things that you will cover).
#
# 30 minutes. It builds on [notebook 00](00_start_here.ipynb).

# %% tags=["parameters"]
PROFILE = "quick"  # "full": the real numbers; say here how many minutes they take

# %%
import torch
import torch.distributed as dist
from torch import nn
import matplotlib.pyplot as plt

from workshop_utils import check, compare_guess, guess, hint, mine, solution, start_ranks, use_style

use_style()

# % [markdown] tags=["instructor"]
# **20 min.**
#
# - *Ask*: what to ask the room here.
# - *Break it*: a mistake to make on purpose, and what the error says.

# %% [markdown]
# ## A section has four steps
#
# First **why**, in prose. Then the reader **predicts**. Then **code**, about 15 lines, 25 at the most. Then a
# cell that **reads the output**. No run of code without a reading. A section that does not belong to the main
# path gets the tag `extra` and its own minutes.
#
# **Predict.** Every rank draws three random numbers. How many different first numbers will there be?

# %%
### BEGIN SOLUTION
# ~ my_guess = None
my_guess = 4
### END SOLUTION
guess("different first numbers", my_guess)

# %% tags=["nbval-ignore-output"]
ranks = start_ranks(4)

# %% tags=["nbval-ignore-output"]
# %%ranks
torch.manual_seed(rank)
draws = torch.rand(3)
draws


# %% tags=["nbval-check-output"]
def first_number():
    torch.manual_seed(dist.get_rank())
    return torch.rand(3)[0].item()


measured = len(set(ranks.run(first_number)))
measured

# %%
compare_guess("different first numbers", measured)

# %% [markdown]
# Each rank has its own random numbers because each was seeded with its own rank. A test that seeds all ranks alike
# would not notice a broadcast that is missing.

# %% [markdown]
# ### Exercise 9.1 · The mean over the ranks  (★★, 5 min)
#
# Complete `mean_over_ranks_`. Afterwards every rank holds the mean of what the ranks held before, in the same
# tensor. The name ends in `_` because the function works in place. Budget: one collective.

# %% [markdown] tags=["hints-9.1"]
# 1. A hint that reminds: a mean is a sum divided by a count. Which collective gives every rank the sum?
# 2. A hint that names the pieces: `dist.all_reduce` works in place, `dist.get_world_size()` is the count.
# 3. A hint that is nearly the code:
#    `dist.all_reduce(tensor)`, then `tensor /= dist.get_world_size()`.


# %% tags=["exercise-9.1", "nbval-check-output"]
def mean_over_ranks_(tensor):
    """Replace `tensor` (any shape, float), on every rank, by its mean over the ranks."""
    ### BEGIN SOLUTION
    # ~ # TODO: the sum over the ranks, then divide
    # ~ raise NotImplementedError("exercise 9.1")
    dist.all_reduce(tensor)
    tensor /= dist.get_world_size()
    ### END SOLUTION


check("9.1", mean_over_ranks_)

# %% [markdown]
# From here on use the reader's own function where it passed: `mine` gives it, or the reference solution.

# %%
mean_over_ranks_ = mine("mean_over_ranks_")

# %% [markdown] tags=["solution"]
# A remark on the solution. This cell is only in the solutions.

# % [markdown] tags=["instructor"]
# **8 min.**
#
# - *Say*: what the library does with one line.

# %% [markdown]
# ## The library's version, parity, cost
#
# Show what the library does with one line, assert that both agree to a stated tolerance, and put the measured
# cost beside the formula. Name each symbol of a formula and its unit right under it. Name the source of a number.

# % [markdown] tags=["instructor"]
# **2 min.**
#
# - *Ask*: what will they remember next week?

# %% [markdown]
# ## Recap
#
# - Three to five lines. What the reader should remember next week.
#
# **What breaks next.** The question of the next notebook.

# %%
ranks.stop()

# %% [markdown]
# **References.** Papers and documentation, with links.
