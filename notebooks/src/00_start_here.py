# %% [markdown]
# # 00 · Start here
#
# **Is my machine ready, and how do these notebooks work?**
#
# After this notebook you can
#
# - tell whether this machine can run the series, and what to do where it cannot;
# - run a cell on four processes at once, and read what comes back, errors included;
# - ask for a check, a hint and a solution.
#
# 10 minutes. It builds on nothing but Python.

# %% [markdown] tags=["instructor"]
# **For the instructor.** Ask who got a failing line from the doctor before anything else, and pair those people
# up. Let the room shout guesses for the start of the ranks. The deadlock is the moment to slow down: have one
# person read the report aloud.

# %% [markdown]
# A notebook is a list of cells. Click on a code cell and press **Shift+Enter**: it runs, and the next cell is
# selected. Go from top to bottom. Nothing breaks if you run a cell twice. "Run All" in the *Run* menu works too,
# in every notebook, whether or not you have solved the exercises.
#
# The first code cells are the same in each notebook.

# %% tags=["parameters"]
PROFILE = "quick"  # "full" trains longer, where a notebook trains

# %%
import torch
import torch.distributed as dist
from torch import nn
import matplotlib.pyplot as plt

from workshop_utils import check, compare_guess, guess, hint, mine, solution, start_ranks, use_style

use_style()

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: a line that says `fail` names its cure; a warning can wait.
# - *Ask*: who has a failing line? Pair those people with a neighbour now, and repair in the break.

# %% [markdown]
# ## Is this machine ready?
#
# The doctor looks at the Python that runs this notebook, at the packages, the memory, the disk and the data. It
# also starts two processes and lets them add two numbers. That takes about ten seconds.

# %% tags=["measures", "nbval-ignore-output"]
from workshop_utils import doctor

doctor.report()

# %% [markdown]
# A line that failed names its cure. A warning can wait: the notebook that needs the missing thing says so. No GPU
# is needed anywhere.

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: four real processes, each with its own variables. The notebook's own process is a fifth.
# - *Ask*: how many seconds until four are ready? Let them shout; most say one.
# - *Break it*: run `my_numbers` in a cell without `%%ranks`. It is a NameError: this process knows nothing of it.

# %% [markdown]
# ## Four processes
#
# Training on many devices is done by many processes. Each runs the same program on its own data. They share no
# memory: what one wants to know from another has to be sent. Each process has a number, its *rank*, from 0 to
# `world_size - 1`. We will also call the process itself a rank.
#
# Usually such programs are started from a terminal and you see little of them. Here the ranks stay alive behind
# the notebook and you talk to them cell by cell. They are real processes, on a laptop too.
#
# **Predict.** Each rank has to start Python, import torch and find the others. How many seconds will four of
# them take? Put a number in place of `None`. A guess costs nothing and is not marked. It makes you look.

# %%
### BEGIN SOLUTION
# ~ my_guess_s = None  # seconds
my_guess_s = 10
### END SOLUTION
guess("four ranks are ready", my_guess_s)

# %% tags=["key-figures", "nbval-ignore-output"]
import time

began_s = time.perf_counter()
ranks = start_ranks(4)
compare_guess("four ranks are ready", time.perf_counter() - began_s, "s")

# %% [markdown]
# Most of that was importing torch, four times at once on the cores that this machine has.
#
# A cell that begins with `%%ranks` runs on every rank. Four names are defined there from the start: `torch`,
# `dist` (which is `torch.distributed`), `rank` and `world_size`.

# %% tags=["nbval-ignore-output"]
# %%ranks
import os

print(f"I am rank {rank} of {world_size}. My process has the number {os.getpid()}.")

# %% [markdown]
# Four answers from four processes. They ran at the same time and may have finished in any order. The output is
# always shown in rank order, each rank with its own colour, the same colour in every figure of the series. The
# last line says how long the cell took, and how many bytes each rank sent if it sent any.
#
# Variables stay, as they do in a notebook. Each rank has its own.

# %%
# %%ranks
my_numbers = torch.full((3,), float(rank))

# %% tags=["nbval-ignore-output"]
# %%ranks
my_numbers

# %% [markdown]
# This cell has no `%%ranks`, so it runs in the notebook's own process. That is a fifth one, and it knows nothing
# of `my_numbers`.

# %% tags=["nbval-check-output"]
"my_numbers" in globals()

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: 0, 1, 2 and 3 on the ranks; what will each hold after the all-reduce? Wait for a six.
# - *Say*: twelve bytes are numbers, the rest of the last line is gloo's bookkeeping.

# %% [markdown]
# ## Talking to each other
#
# `dist.all_reduce(tensor)` adds up the tensors of all ranks and leaves the sum in each of them. It is the most
# important operation of the series. You will write it yourself, four times, in notebook 02.
#
# **Predict.** Each element of `my_numbers` is 0 on rank 0, 1 on rank 1, 2 on rank 2 and 3 on rank 3. What will it be
# on each of them afterwards?

# %%
### BEGIN SOLUTION
# ~ my_guess = None
my_guess = 6
### END SOLUTION
guess("after the all_reduce", my_guess)

# %% tags=["nbval-ignore-output"]
# %%ranks
dist.all_reduce(my_numbers)
my_numbers

# %%
compare_guess("after the all_reduce", 0 + 1 + 2 + 3)

# %% [markdown]
# All four now hold the same sum. The last line counts what gloo, the library underneath, sent from each rank:
# three float32 numbers are only 12 bytes, the rest is its own bookkeeping.
#
# | you write | the cell runs |
# |---|---|
# | `%%ranks` | on every rank |
# | `%%ranks --only 0,2` | on ranks 0 and 2 |
# | `%%ranks --here` | on every rank, then in the notebook's process |
# | `%%ranks --deadline 5` | on every rank, and is stopped after 5 seconds |
# | `%%ranks --expect-error` | on every rank; a failure is shown, and "Run All" goes on |

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: read a report from the top. The first line names the rank that failed first; the others only waited.
# - *Ask*: have one person read the deadlock's report aloud. Which rank is not in the list? It is rank 0.
# - *Break it*: the two cells are the mistakes. If somebody's notebook hangs, show the stop button: three seconds.

# %% [markdown]
# ## When something goes wrong
#
# Things will go wrong: that is how one learns this. There are two ways. The first: one rank makes a mistake. Here
# rank 1 divides by zero while the others wait for it in the `all_reduce`.

# %% tags=["nbval-ignore-output"]
# %%ranks --expect-error
numbers = torch.ones(3) * rank
if rank == 1:
    1 / 0
dist.all_reduce(numbers)

# %% [markdown]
# Read such a report from the top. The first line names the rank that failed first; that one is the cause. Below
# it stands where the other ranks were at that moment: they waited, and nothing was wrong with them. At the end
# comes rank 1's own traceback. It took about a second, no process died, and the variables are still there. Each
# element is 6 on every rank by now, and four sixes are added:

# %% tags=["nbval-ignore-output"]
# %%ranks
dist.all_reduce(my_numbers)
my_numbers

# %% [markdown]
# The second way: nobody makes a mistake, but everybody waits. That is a *deadlock*. Here rank 0 does not take
# part, so the others wait for it. We let them wait for 3 seconds. Without a deadline the watchdog ends a deadlock
# after 20 seconds.

# %% tags=["nbval-ignore-output"]
# %%ranks --expect-error --deadline 3
if rank != 0:
    dist.all_reduce(my_numbers)

# %% [markdown]
# The report says in which call and in which line each rank waited. That is what you need to repair it: look for
# the rank that is missing from the list, and ask why it does not come.
#
# The **stop button** (■, or *Kernel → Interrupt*) works as well: all ranks stop within three seconds. If a process
# is lost for good, `ranks.restart()` or a new `start_ranks(4)` brings it back.

# %% [markdown] tags=["instructor"]
# **4 min.**
#
# - *Type*: 0.1 live, with `return 4 * tensor.numel()` first. The check says `bfloat16)) is 48, expected 24`.
# - *Say*: the check ran it on tensors that you did not see. That is what it is for.
# - *Room*: 0.2 is theirs, 3 minutes. Most write `rank - 1` for the left: `rank 0: (left, right) is [-1, 1]`.
# - *Stuck*: `%` goes round in Python for negative numbers too; `-1 % 4` is 3.

# %% [markdown]
# ## How an exercise works
#
# You complete a function and run the cell. Its last line calls `check`, which tries your function and says what
# it found: passed, or what was wrong, where, and what was expected. Try the cell below once before you change it.
# The stars in a title say how hard an exercise is, the minutes how long it may take you.
#
# There are three hints for each exercise, each saying more than the one before. Open them under the exercise, or
# call `hint("0.1")`. After the third, `solution("0.1")` shows one way to write it.

# %% [markdown]
# ### Exercise 0.1 · How many bytes?  (★, 1 min)
#
# A tensor of 3 x 4 float32 numbers takes 3 · 4 · 4 = 48 bytes, because a float32 number takes 4. In bfloat16, a
# format with fewer digits, each number takes 2. Complete `tensor_bytes`. It has to be right for every shape and
# every type of number.

# %% [markdown] tags=["hints-0.1"]
# 1. Two facts are needed: how many elements there are, and how many bytes one of them takes. A tensor knows both.
# 2. `tensor.numel()` is the number of elements. `tensor.element_size()` is the bytes that one element takes.
# 3. `return tensor.numel() * tensor.element_size()`


# %% tags=["exercise-0.1", "nbval-check-output"]
def tensor_bytes(tensor):
    """Bytes that the elements of `tensor` take."""
    ### BEGIN SOLUTION
    # ~ # TODO: the number of elements times the bytes of one element
    # ~ raise NotImplementedError("exercise 0.1")
    return tensor.numel() * tensor.element_size()
    ### END SOLUTION


check("0.1", tensor_bytes)

# %% [markdown]
# If it says "not solved yet": that is the stub talking. Replace its lines and run the cell again. If you return
# `4 * tensor.numel()`, the complaint shows the tensor for which that is wrong.
#
# ### Exercise 0.2 · Your neighbours  (★, 3 min)
#
# In notebook 02 the ranks stand in a ring, and each one sends to its right and receives from its left. The right
# neighbour of rank 0 is rank 1, that of the last rank is rank 0. Complete `ring_neighbours`. `check` runs it on
# every rank.
#
# Inside a function, ask torch who you are: `dist.get_rank()` and `dist.get_world_size()`. The names `rank` and
# `world_size` exist in `%%ranks` cells only, and your function is defined here, in the notebook's process, and sent
# to the ranks from here.

# %% [markdown] tags=["hints-0.2"]
# 1. Rank 2 of 4 has 1 on its left and 3 on its right. Only the two ends of the row need care.
# 2. Counting goes round when you take the remainder: `4 % 4` is 0, and in Python `-1 % 4` is 3.
# 3. `left = (rank - 1) % world_size`, and `right` is the same with `+ 1`.


# %% tags=["exercise-0.2", "nbval-check-output"]
def ring_neighbours():
    """(left, right): the ranks on both sides of this one, in a ring of all ranks."""
    ### BEGIN SOLUTION
    # ~ # TODO: your own rank, the number of ranks, then the two neighbours
    # ~ raise NotImplementedError("exercise 0.2")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return (rank - 1) % world_size, (rank + 1) % world_size
    ### END SOLUTION


check("0.2", ring_neighbours)

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: answers are kept on this machine. Who skips an exercise can do the next one: `mine` has the reference.
# - *Say*: who comes late, or whose kernel died, types `%catchup 02.7` and is where the room is.

# %% [markdown]
# ## Your own code, later
#
# What you have solved is kept, on this machine only. `mine("ring_neighbours")` gives you your own function where
# it passed, and the reference solution where it did not, and says which. So the later parts of a notebook run on
# your code, and you can skip an exercise and still do the next one.

# %% tags=["nbval-ignore-output"]
neighbours = mine("ring_neighbours")
ranks.run(neighbours)

# %% [markdown]
# `ranks.run(function)` calls a function on every rank and returns the results as a list, in rank order.
#
# Progress survives a restart. `python -m workshop_utils progress` shows the same table in a terminal.

# %% tags=["nbval-ignore-output"]
from workshop_utils import progress

progress()

# %% [markdown] tags=["instructor"]
# **0 min.**
#
# - *Say*: leave the map for home. Point at the rows of today, nothing more.
# - *Ask*: who has not run `make fetch`? It needs a network, and 07 and 08 need it.

# %% [markdown]
# ## The map
#
# | notebook | the question it answers | minutes |
# |---|---|---|
# | 00, this one | Is my machine ready, and how do these notebooks work? | 10 |
# | [01](01_single_device_mlp.ipynb) | What exactly does one training step hold in memory, compute and depend on? | 25 |
# | [02](02_all_reduce.ipynb) | How do processes that share nothing agree on a sum, and what does it cost? | 50 |
# | [03](03_distributed_data_parallel.ipynb) | What must be communicated so that N replicas equal one big batch? | 45 |
# | [04](04_fully_sharded_data_parallel.ipynb) | How do N devices hold a model that fits on none of them, and what does that cost? | 50 |
# | [05](05_lora.ipynb) | How few parameters can a new task be learned with? | 45 |
# | [06](06_intrinsic_dimension.ipynb) | How many directions does a task really need, and is LoRA one way to pick them? | 50 |
# | [07](07_qlora.ipynb) | How few bits can the frozen part live in? | 45 |
# | [08](08_fsdp_and_qlora.ipynb) | What can I fine-tune on the small GPUs I have? | 45 |
#
# The minutes are those of a room where somebody leads. Alone, solving every exercise, plan for half as much again.
#
# The last two fine-tune a language model. `make fetch` brings it, once: do that while the network is good.

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: close the laptop lids and let three people say one line of the recap each, in their own words.

# %% [markdown]
# ## Recap
#
# - A rank is a process with a number. Ranks share nothing and keep their variables between cells.
# - `%%ranks` runs a cell on all of them; the output comes in rank order.
# - A mistake on one rank is reported in about a second, a deadlock with the line in which each rank waits.
# - `check`, `hint`, `solution` are there for every exercise; `mine` carries your code on.
#
# **What comes next.** Before work can be shared out, you have to know what the work is. [Notebook
# 01](01_single_device_mlp.ipynb) trains one network in one process and looks inside a single step.

# %%
ranks.stop()

# %% [markdown]
# **References.** [torch.distributed](https://docs.pytorch.org/docs/stable/distributed.html) ·
# [gloo](https://github.com/pytorch/gloo), the library that carries the bytes here ·
# [Jupyter kernels](https://jupyter-client.readthedocs.io), which is what the ranks are.
