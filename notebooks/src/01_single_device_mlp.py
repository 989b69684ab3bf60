# %% [markdown]
# # 01 · One network on one device
#
# **What exactly does one training step hold in memory, compute and depend on?**
#
# After this notebook you can
#
# - write a training step and say what each of its lines leaves behind in memory, to the byte;
# - predict the operations of a forward and a backward pass, and explain the prediction when it is wrong;
# - say which parts of a step could run on another device, and what they would have to be sent;
# - show that the gradient of a big batch is the average of its parts' gradients, also when the parts are uneven.
#
# 25 minutes. It builds on notebook 00 and on knowing what a gradient is.

# %% tags=["parameters"]
PROFILE = "quick"  # "full" trains five times longer: about a minute on two cores

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
# - *Say*: a device is one core in this series, so `torch.set_num_threads(1)`. Later each rank is one.
# - *Type*: the MLP. Say the shape letters while you type them: B images, 784 pixels, 200 hidden units.
# - *Ask*: where do most of the 199,210 parameters sit? Four of five are in fc1, and it matters in 01.5.

# %% [markdown]
# ## What do we train, and on what?
#
# Images of handwritten digits, 28 by 28 pixels, each with a label from 0 to 9. The line below says which images
# this machine has: the 60,000 of MNIST to train on, or 4,000 of the 5,000 that come with a Python package. Others
# are kept apart for the test.

# %% tags=["nbval-ignore-output"]
from torch.nn import functional as F

from workshop_utils.data import load_mnist
from workshop_utils.plotting.single_device import plot_digits

data = load_mnist()
torch.set_num_threads(1)  # in this series a device is one core, as each rank will be
firsts = [int((data.train_labels == digit).nonzero()[0]) for digit in range(10)]
figure = plot_digits(data.train_images[firsts], captions=range(10))

# %% [markdown]
# The network is a *multilayer perceptron* (MLP): matrix products with a nonlinearity between them. It is small, so
# that every number about it can be checked by hand. Much of the series stays with it.
#
# Later notebooks import this class from `workshop_utils.models`. Here you read it. Shape letters: `B` images in
# the batch, `D` = 784 pixels, `H` = 200 hidden units. A layer from $n$ to $m$ units has an $m \times n$ matrix and
# $m$ biases.


# %% tags=["live"]
class MLP(nn.Module):
    def __init__(self, hidden=200):
        super().__init__()
        self.fc1 = nn.Linear(784, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 10)

    def forward(self, images_BD):
        h_BH = self.fc1(images_BD).relu()
        h_BH = self.fc2(h_BH).relu()
        return self.fc3(h_BH)


# %% tags=["nbval-check-output"]
torch.manual_seed(0)
model = MLP()
for name, parameter in model.named_parameters():
    print(f"{name:11} {list(parameter.shape)!s:11} {parameter.numel():>8,}")
num_parameters = sum(p.numel() for p in model.parameters())
print(f"{'all':23} {num_parameters:>8,}")

# %% [markdown] tags=["instructor"]
# **4 min.**
#
# - *Type*: `train_step` live, but leave out `zero_grad`. Step 1 is right, then `step 2 moved by the gradients of
#   steps 1 and 2 added up`. Let the room find the line.
# - *Ask*: why does torch add gradients up instead of replacing them? The answer is 01.10.
# - *Stuck*: five lines in this order: clear, forward and loss, backward, step, return the loss without its graph.

# %% [markdown]
# Four of five parameters sit in the first layer. Remember that: it will spoil a rule of thumb in a few minutes.
#
# ## What is one training step?
#
# Four things happen to one batch. *Forward*: the network turns images into scores, the loss turns scores and
# labels into one number. *Backward*: each parameter receives its *gradient*, the direction in which the loss
# grows. *Update*: the optimizer moves each parameter against its gradient. And before all this: gradients left
# over from the last batch have to go, because `backward()` adds to what is in `.grad`.
#
# ### Exercise 1.1 · A training step  (★, 4 min)
#
# Write it. The loss is the cross-entropy, averaged over the batch, and it is what you return: the value before the
# update. The check runs three steps in a row, on three batches, and compares each parameter after each step.

# %% [markdown] tags=["hints-1.1"]
# 1. You need five lines: clear, forward and loss, backward, update, return. Which object clears, and which updates?
# 2. `optimizer.zero_grad()` clears, `loss.backward()` fills `.grad`, `optimizer.step()` reads it. The loss is
#    `F.cross_entropy(scores, labels)`; it wants scores, not probabilities.
# 3. The order is `zero_grad`, `loss = F.cross_entropy(model(images), labels)`, `backward`, `step`. Return
#    `loss.detach()`: the number without the graph behind it.


# %% tags=["exercise-1.1"]
def train_step(model, optimizer, images, labels):
    """One step on images [B, D] and labels [B]. Returns the mean loss before the update, a scalar tensor."""
    ### BEGIN SOLUTION
    # ~ # TODO: clear the gradients, forward, loss, backward, update; return the loss. Shapes: scores are [B, 10].
    # ~ raise NotImplementedError("exercise 1.1")
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()
    ### END SOLUTION


check("1.1", train_step)

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: how many percent right? Write three guesses on the board before the cell runs; it takes some ten seconds.
# - *Say*: seconds, on one core. So everything that follows is about what grows when the model or the data does.

# %% [markdown]
# ## Does it learn?
#
# `train` repeats a step on random batches of 256 images and lets the learning rate fall to zero on the way.
# `mine("train_step")` is your step if it passed, and the reference if not, so you can go on either way.
#
# **Predict.** Which share of digits that it has never seen will the network read correctly, in percent? Trained
# on 60,000 images, networks of this size reach about 98, and with 4,000 it is less. How much less? Look above
# which of the two this machine has.

# %%
### BEGIN SOLUTION
# ~ my_guess = None  # percent
my_guess = 97
### END SOLUTION
guess("test accuracy", my_guess)

# %% tags=["nbval-ignore-output"]
import time

from workshop_utils.training import evaluate, train

step = mine("train_step")
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
began_s = time.perf_counter()
steps = 2_000 if PROFILE == "quick" else 10_000
losses = train(model, optimizer, data.train_images, data.train_labels, steps=steps, step=step)
train_s = time.perf_counter() - began_s
test_accuracy = evaluate(model, data.test_images, data.test_labels)
print(
    f"{steps:,} steps in {train_s:.0f} s, {test_accuracy:.1%} of {len(data.test_images):,} test images right"
)
compare_guess("test accuracy", 100 * test_accuracy, "%")
smooth = torch.tensor(losses).unfold(0, 50, 50).mean(dim=1)
plt.figure(figsize=(7.2, 2.6))
plt.semilogy(range(25, 25 + 50 * len(smooth), 50), smooth)
plt.title("The loss on the training batches falls all the way")
plt.xlabel("step")
plt.ylabel("loss, mean of 50 steps")
plt.show()

# %% [markdown] tags=["instructor"]
# **5 min.**
#
# - *Room*: 1.2 is theirs, 4 minutes. Who multiplies by 4 hears `bfloat16: parameters is 796,840, expected 398,420`.
# - *Break it*: write the formula 4 + 4 + 8 for every parameter. `before any step: gradients is 796,840, expected 0`.
# - *Ask*: activations in units of the parameters' bytes? Most say far below 1; it is 1.54 at a batch of 256.
# - *Say*: parameters, gradients, moments follow the model; activations follow the batch. The next figure shows it.

# %% [markdown]
# That took seconds, and nothing was distributed. So why would anybody use two devices? Because each of the things
# below grows with the model or with the data, and one device has a fixed amount of each. From here on we stop the
# clock and look inside one of those steps.
#
# ## Which tensors does a step hold, and how many bytes are they?
#
# Adam keeps two numbers for each parameter: a running mean of its gradient and a running mean of the squared
# gradient. They are called its two *moments*. The optimizer has them in `optimizer.state`.

# %% tags=["nbval-check-output"]
for name, value in optimizer.state[model.fc1.weight].items():
    print(f"{name:11} {list(value.shape)!s:11} {value.dtype}")
print("tensors in optimizer.state:", sum(len(state) for state in optimizer.state.values()))

# %% [markdown]
# `exp_avg` and `exp_avg_sq` are the moments, each as large as the parameter. `step` is a counter, 4 bytes for each
# of the six parameter tensors.
#
# ### Exercise 1.2 · Bytes of each kind  (★, 4 min)
#
# Count the bytes of parameters, gradients and optimizer state that exist at this moment. The check asks about
# models that are not this one: in bfloat16, with a frozen layer, before the first step, with another optimizer.
# So read the tensors, do not trust a formula. You may count Adam's step counters or leave them out.

# %% [markdown] tags=["hints-1.2"]
# 1. A tensor has `numel()` elements of `element_size()` bytes each. Which tensors are there before the first
#    backward?
# 2. `parameter.grad` is `None` until a backward has filled it, and stays `None` for a frozen parameter.
#    `optimizer.state.values()` gives one dictionary for each parameter that has been updated.
# 3. Write `nbytes = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)` and call it three times:
#    on `model.parameters()`, on the gradients that are not `None`, and on
#    `[t for state in optimizer.state.values() for t in state.values()]`.


# %% tags=["exercise-1.2"]
def bytes_by_kind(model, optimizer):
    """{"parameters": bytes, "gradients": bytes, "optimizer": bytes}, as they are right now."""
    ### BEGIN SOLUTION
    # ~ # TODO: sum elements times bytes per element, for each of the three kinds.
    # ~ raise NotImplementedError("exercise 1.2")
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
    kinds = {"parameters": list(model.parameters()), "gradients": gradients, "optimizer": state}
    return {kind: sum(t.numel() * t.element_size() for t in tensors) for kind, tensors in kinds.items()}
    ### END SOLUTION


check("1.2", bytes_by_kind)

# %% tags=["nbval-ignore-output"]
held = mine("bytes_by_kind")(model, optimizer)
for kind, count in held.items():
    print(f"{kind:11} {count:>10,} bytes = {count / num_parameters:.1f} per parameter")

# %% [markdown]
# In float32 with Adam a parameter costs 4 + 4 + 8 = 16 bytes, three quarters of it for training alone. At that
# rate a network of 7 billion parameters holds 112 GB. Which of these bytes each device needs is the question of
# notebook 04. (If your step clears the gradients at its end instead of its beginning, they are gone here, and the
# line above says 0. They took their 4 bytes until then.)
#
# One kind is missing. Backward needs intermediate results of the forward: to get the gradient of a weight you
# need what was multiplied by it. Autograd keeps them from the forward until the backward has used them. They are
# called *activations*.
#
# **Predict.** For a batch of 256 images: how many bytes do the kept activations take, compared with the
# parameters' 797 KB?

# %%
### BEGIN SOLUTION
# ~ my_guess = None  # a factor: 1 means as many bytes as the parameters
my_guess = 0.5
### END SOLUTION
guess("activations, in units of the parameters' bytes", my_guess)

# %% [markdown]
# Autograd lets you watch. Each tensor that it keeps passes through a function of ours, a *hook*, on its way in.

# %% tags=["nbval-check-output"]
B = 256
images, labels = data.train_images[:B].clone(), data.train_labels[:B].clone()
names = {p.data_ptr(): name for name, p in model.named_parameters()}


def show_saved(tensor):
    what = names.get(tensor.data_ptr(), "")
    print(f"saved {list(tensor.shape)!s:11} {tensor.dtype!s:13} {what}")
    return tensor.detach()


with torch.autograd.graph.saved_tensors_hooks(show_saved, lambda tensor: tensor):
    loss = F.cross_entropy(model(images), labels)

# %% [markdown]
# Read it from the top. The first layer keeps its input, the images. A ReLU keeps its output, and the next layer
# keeps the same tensor as its input: one tensor, kept twice, held once. The two lines with a name are parameters,
# which are there anyway. The loss keeps the log-probabilities, also twice, the labels and one
# number.
#
# So there is a formula. With $B$ images in the batch (count), layer inputs of 784, 200 and 200 numbers and 10
# scores (numbers per image), 4 bytes for each number and 8 for each label:
#
# $$ \text{activation bytes} = 4 B\,(784 + 200 + 200 + 10) + 8 B + 4 $$
#
# `record_activations` is the hook above, counting each byte once.

# %% tags=["nbval-ignore-output"]
from workshop_utils.memory import measure_memory, record_activations

with record_activations(model) as saved:
    loss = F.cross_entropy(model(images), labels)
formula_bytes = 4 * B * (784 + 200 + 200 + 10) + 8 * B + 4
print(f"measured {saved.total_bytes:,} bytes, formula {formula_bytes:,} bytes")
ratio = saved.total_bytes / (4 * num_parameters)
compare_guess("activations, in units of the parameters' bytes", ratio)

# %% [markdown]
# Equal to the byte, and half as much again as the parameters. Now watch a first step from birth: what
# exists after each of its lines?

# %% tags=["nbval-ignore-output"]
from workshop_utils.plotting.single_device import plot_bytes_by_kind

new_model = MLP()
adam, rows = torch.optim.Adam(new_model.parameters()), {}
rows["model created"] = measure_memory(new_model, adam).by_kind()
with record_activations(new_model) as saved:
    loss = F.cross_entropy(new_model(images), labels)
rows["after forward"] = measure_memory(new_model, adam, saved).by_kind()
loss.backward()  # frees the activations as it goes
rows["after backward"] = measure_memory(new_model, adam).by_kind()
adam.step()
rows["after update"] = measure_memory(new_model, adam).by_kind()
figure = plot_bytes_by_kind(rows, f"A first step on {B} images, line by line")

# %% [markdown]
# Forward brings the activations, backward trades them for gradients, the first update brings the moments, and
# those stay. Parameters, gradients and moments depend on the model alone. Activations depend on the batch too:

# %% tags=["nbval-ignore-output"]
rows, steady = {}, measure_memory(new_model, adam).by_kind()
for batch_size in (1, 256, 4096):
    with record_activations(new_model) as saved:
        F.cross_entropy(new_model(torch.rand(batch_size, 784)), torch.zeros(batch_size, dtype=torch.int64))
    rows[f"batch {batch_size:,}"] = steady | {"activations": saved.total_bytes}
figure = plot_bytes_by_kind(rows, "Only the activations grow with the batch")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: backward over forward? Everybody who has read a blog says 2. The counter says 1.21.
# - *Say*: nobody waits for the gradient of the images. Ask for it, and the ratio is 2.0000.

# %% [markdown]
# ## What does a step compute?
#
# Nearly all of it is matrix products. A product of $[B, n]$ with $[n, m]$ takes $B\,n\,m$ multiplications and as
# many additions. Together these are its *FLOPs*, floating-point operations:
#
# $$ \text{FLOPs} = 2\,B\,n\,m $$
#
# $B$: images in the batch (count). $n$, $m$: units before and after the layer (count).
#
# The backward of a layer has two products of that size: one gives the gradient of its weights, one gives the
# gradient of its input, which the layer before it is waiting for. Hence the rule that a backward costs twice its
# forward.
#
# **Predict.** What will the counter say for our network: backward over forward?

# %%
### BEGIN SOLUTION
# ~ my_guess = None  # backward FLOPs / forward FLOPs
my_guess = 2.0
### END SOLUTION
guess("backward FLOPs / forward FLOPs", my_guess)

# %% tags=["nbval-ignore-output"]
from torch.utils.flop_counter import FlopCounterMode

with FlopCounterMode(display=False) as forward:
    loss = F.cross_entropy(model(images), labels)
with FlopCounterMode(display=False) as backward:
    loss.backward()
weights = 784 * 200 + 200 * 200 + 200 * 10
print(f"forward   measured {forward.get_total_flops():,}   formula {2 * B * weights:,}")
print(f"backward  measured {backward.get_total_flops():,}   twice the forward {4 * B * weights:,}")
flop_ratio = backward.get_total_flops() / forward.get_total_flops()
compare_guess("backward FLOPs / forward FLOPs", flop_ratio)

# %% [markdown]
# Far from 2. The rule forgot that nobody waits for the gradient of the images: the first layer skips its second
# product, and the first layer is most of this network. Counted properly, with $n_i$ and $m_i$ the units before
# and after layer $i$ (count):
#
# $$ \frac{\text{backward}}{\text{forward}} = \frac{2B\sum_i n_i m_i + 2B\sum_{i>1} n_i m_i}{2B\sum_i n_i m_i}
# = 1 + \frac{200 \cdot 200 + 200 \cdot 10}{198{,}800} $$
#
# If the explanation is right, asking for the gradient of the images must give exactly 2, and a deeper network
# must come closer to 2 by itself.


# %% tags=["nbval-check-output"]
def count_ratio(net, inputs):
    with FlopCounterMode(display=False) as forward:
        loss = net(inputs).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return backward.get_total_flops() / forward.get_total_flops()


deep = nn.Sequential(nn.Linear(784, 200), *[nn.Sequential(nn.ReLU(), nn.Linear(200, 200)) for _ in range(20)])
print(f"our network, from the formula      {1 + 42_000 / 198_800:.4f}")
print(f"our network, measured              {count_ratio(model, images):.4f}")
print(f"with the images' gradient          {count_ratio(model, images.clone().requires_grad_()):.4f}")
print(f"twenty more layers, without it     {count_ratio(deep, images):.4f}")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: which phase is longest? Then look at the white in the picture: Python, deciding what to do next.
# - *Say*: a second device takes away arithmetic, not the white.

# %% [markdown]
# The rule is right for deep networks and wrong for yours. Measure before you quote.
#
# ## Where does the time go?
#
# FLOPs are not seconds. torch's profiler writes down when each operation began and ended. We mark the three phases
# with `record_function`, take 25 steps and look at the one of median length. Being watched makes small operations
# look longer than they are.
#
# **Predict.** Which of the three phases takes longest: forward, backward or update? Recall that the backward has
# 1.21 times the forward's FLOPs, and the update has hardly any.

# %%
### BEGIN SOLUTION
# ~ my_guess = None  # "forward", "backward" or "update"
my_guess = "backward"
### END SOLUTION
guess("the longest phase", my_guess)

# %% tags=["measures", "nbval-ignore-output"]
from torch.profiler import ProfilerActivity, profile, record_function

from workshop_utils.plotting.single_device import busy_shares, plot_profile, step_timeline


def marked_step():
    with record_function("forward"):
        loss = F.cross_entropy(new_model(images), labels)
    with record_function("backward"):
        loss.backward()
    with record_function("update"):
        adam.step()
        adam.zero_grad()


for _ in range(10):
    marked_step()  # the first steps are slower: not measured
with profile(activities=[ProfilerActivity.CPU]) as watched:
    for _ in range(25):
        marked_step()

# %% tags=["measures", "nbval-ignore-output"]
spans, operations = step_timeline(watched)
figure = plot_profile(spans, operations)
compare_guess("the longest phase", max(spans, key=lambda phase: spans[phase][1] - spans[phase][0]))
for what, share in busy_shares(spans, operations).items():
    print(f"{what:20} {share:.0%}")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: which gradient is complete first? Read it off the graph: the last layer's.
# - *Say*: remember that order. Notebook 03 sends gradients in it.

# %% [markdown]
# Dark is arithmetic that the FLOP counter sees, light is the rest: small operations, most of them Adam's, each of
# which reads and writes every number for one or two operations on it. White is Python deciding what to do next.
# The update has almost no FLOPs and yet takes a good part of the step. A phase can be bound by arithmetic, by
# memory or by overhead, and a second device helps only with what it takes away.
#
# ## What does autograd remember?
#
# During the forward, autograd builds a graph of what has to be done backwards. `loss.grad_fn` is its first node,
# and `next_functions` leads on from each. Our function walks along these and draws what it finds.

# %% tags=["nbval-ignore-output"]
from workshop_utils.plotting.single_device import plot_autograd_graph

loss = F.cross_entropy(model(images), labels)
figure = plot_autograd_graph(loss, dict(model.named_parameters()))

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: strides of `A.T`? Answer before the figure: [1, 4], no byte moves.
# - *Say*: a message is a run of bytes, so lists are flattened, or born flat. 03 and 04 are built on the last cell.
# - *Break it*: `zero_grad()` after the buffer is set up. It sets `.grad` to None, and the tie to the buffer is gone.

# %% [markdown]
# Each layer is an `Addmm`, a matrix product with the bias added. `T` is there because a layer stores its weight as
# $[m, n]$ and multiplies by its transpose. The green ends are where gradients are collected. The dashed box is the
# product that the first layer skips. And there is an order in it: the last layer's gradients are done first.
#
# ## How do these tensors lie in memory?
#
# A *storage* is one run of bytes. A tensor is a *view* of a storage: a shape, a place to begin, and a *stride* for
# each dimension, the number of elements to skip for the next index. Transposing changes strides and moves no byte.
#
# **Predict.** `A` is 3 by 4 and has strides [4, 1]. What are the strides of `A.T`, and which of its elements lie
# side by side? Look at the figure after you have answered. Each cell shows the place in the storage that it reads.

# %%
from workshop_utils.plotting.single_device import plot_strides

A = torch.arange(12.0).view(3, 4)
figure = plot_strides({"A": A, "A.T": A.T, "A[:, 1:3]": A[:, 1:3]})
same_storage = A.T.untyped_storage().data_ptr() == A.untyped_storage().data_ptr()
print("A and A.T share a storage:", same_storage)
A.T[3, 0] = 100  # writing through one view ...
print("A[0, 3] is now", A[0, 3].item())  # ... shows in the other
print("storages of the model:", len({p.untyped_storage().data_ptr() for p in model.parameters()}))

# %% [markdown]
# `A.T` has the strides [1, 4]. What lies side by side is each of its columns, which were rows of `A`.
#
# A tensor is *contiguous* if reading it row by row reads its storage from left to right. That matters for us
# because a message is a run of bytes: a network card or a socket sends what lies side by side.
#
# Our six gradients lie in six storages: six messages, and each message has a fixed cost besides its bytes
# (notebook 02 measures it). So libraries *flatten*: they copy the list into one contiguous buffer, send it once,
# and copy the result back. What does the copying cost? The rows below are measured in turn, so that whatever else
# the machine does hits all of them alike.

# %% tags=["nbval-ignore-output"]
from workshop_utils.plotting.single_device import plot_times

F.cross_entropy(new_model(images), labels).backward()
grads = [p.grad for p in new_model.parameters()]
flat, other = torch.cat([g.reshape(-1) for g in grads]), torch.empty(num_parameters)
sizes = [g.numel() for g in grads]
square, target = torch.rand(446, 446), torch.empty(446, 446)  # as many numbers as the gradients, nearly


def copy_back():
    for grad, piece in zip(grads, flat.split(sizes), strict=True):
        grad.copy_(piece.view_as(grad))


actions = {
    "a training step": lambda: step(new_model, adam, images, labels),
    "flatten: 6 gradients into one buffer": lambda: torch.cat([g.reshape(-1) for g in grads], out=other),
    "and back": copy_back,
    "copy one contiguous tensor": lambda: other.copy_(flat),
    "copy one transposed tensor": lambda: target.copy_(square.T),
}

# %% tags=["measures", "nbval-ignore-output"]
times_s = {name: [] for name in actions}
for _ in range(100):
    for name, action in actions.items():
        began_s = time.perf_counter()
        action()
        times_s[name].append(time.perf_counter() - began_s)
figure = plot_times(times_s, "Moving 199,210 numbers, beside the step that made them")
median_s = {name: sorted(samples)[len(samples) // 2] for name, samples in times_s.items()}
there_and_back_s = median_s["flatten: 6 gradients into one buffer"] + median_s["and back"]
flatten_share = there_and_back_s / median_s["a training step"]
print(f"flatten and back: {1e6 * there_and_back_s:,.0f} µs, {flatten_share:.0%} of a training step")

# %% [markdown]
# Copying a list costs more than one plain copy of the same bytes, and reading against the strides costs more
# again. Beside a step it is little here, but it is paid in each step. The copy can be avoided altogether: let the gradients *be* views of one buffer.
# `backward()` adds into `.grad` where a `.grad` exists, so it writes into the buffer.

# %% tags=["nbval-check-output"]
buffer = torch.zeros(num_parameters)
for parameter, piece in zip(new_model.parameters(), buffer.split(sizes), strict=True):
    parameter.grad = piece.view_as(parameter)
F.cross_entropy(new_model(images), labels).backward()
fresh = torch.autograd.grad(F.cross_entropy(new_model(images), labels), list(new_model.parameters()))
print("the buffer holds all gradients:", torch.allclose(buffer, torch.cat([g.reshape(-1) for g in fresh])))
print("bytes held for gradients:", f"{measure_memory(new_model).gradients_bytes:,}")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Ask*: one image of 256 is replaced; how many rows of the scores change? One. And of fc1's gradient? All.
# - *Say*: that table is the series in five rows. Let people name the notebook for each.

# %% [markdown]
# The same number of bytes, no copy, and one message. Notebooks 03 and 04 are built on this. `buffer.zero_()` now
# clears all gradients at once; `zero_grad()` would cut the tie, because it sets each `.grad` to `None`.
#
# ## What depends on what?
#
# To run a part of the step elsewhere you have to send what it needs. So: what does it need? You can find out by
# poking. Change one thing, run the step again, look at what else changed.
#
# **Predict.** One image of the 256 is replaced. In how many rows of the scores, of 256, does something change?

# %%
### BEGIN SOLUTION
# ~ my_guess = None  # rows of the scores [256, 10]
my_guess = 1
### END SOLUTION
guess("rows of the scores that change", my_guess)


# %%
def trace(net, images, labels):
    """All that one forward and backward compute, by name: activations [B, ...] and weight gradients."""
    h1 = net.fc1(images).relu()
    h2 = net.fc2(h1).relu()
    scores = net.fc3(h2)
    loss = F.cross_entropy(scores, labels)
    grads = torch.autograd.grad(loss, [net.fc1.weight, net.fc2.weight, net.fc3.weight])
    return {"h1": h1, "h2": h2, "scores": scores} | dict(zip(("grad fc1", "grad fc2", "grad fc3"), grads))


def what_changed(before, after):
    for name, old in before.items():
        changed = ((after[name] - old).abs() > 1e-12).any(dim=1)
        rows = f"{int(changed.sum())} of {B} rows" if len(changed) == B else "yes" if changed.any() else "no"
        print(f"   {name:9} {rows}")


# %% tags=["nbval-ignore-output"]
torch.manual_seed(3)
net, x = MLP().double(), images.double()
before = trace(net, x, labels)
poked = x.clone()
poked[5] = 1 - poked[5]
print("image 5 is inverted:")
after = trace(net, poked, labels)
what_changed(before, after)
print("one weight of fc2 is changed:")
with torch.no_grad():
    net.fc2.weight[7, 3] += 1
what_changed(before, trace(net, x, labels))
rows_changed = int(((after["scores"] - before["scores"]).abs() > 1e-12).any(dim=1).sum())
compare_guess("rows of the scores that change", rows_changed, "of 256")

# %% [markdown]
# An image reaches its own row of every activation, and all gradients. A weight reaches what comes after it, for
# every image whose unit is not silenced by the ReLU, and again all gradients: the backward of fc1 goes through fc2.
#
# Now poke the update. One entry of one gradient is changed; how many parameters come out different? And in which
# order are the gradients complete? A hook on each parameter tells. It is given the parameter, not the gradient.

# %% tags=["nbval-check-output"]
results = []
for entry in (-1.0, 1.0):
    torch.manual_seed(1)
    net = MLP()
    F.cross_entropy(net(images), labels).backward()
    net.fc1.weight.grad[20, 300] = entry
    torch.optim.Adam(net.parameters()).step()
    results.append(torch.cat([p.detach().reshape(-1) for p in net.parameters()]))
print("parameters that differ:", int((results[0] != results[1]).sum()), "of", f"{num_parameters:,}")

ready, names = [], {parameter: name for name, parameter in net.named_parameters()}
for parameter in net.parameters():
    parameter.register_post_accumulate_grad_hook(lambda p: ready.append(names[p]))
F.cross_entropy(net(images), labels).backward()
print("gradients complete, in this order:", ", ".join(ready))

# %% [markdown]
# Write down what you found, on paper or in a new cell, in the form "part, needs, so it could run elsewhere
# if ...". Then compare with the picture, which shows a batch cut into two halves.

# %% tags=["nbval-ignore-output"]
from workshop_utils.plotting.single_device import plot_dependencies

figure = plot_dependencies()

# %% [markdown] tags=["instructor"]
# **4 min.**
#
# - *Room*: 1.3 is theirs. Before they start, write the sum and the mean on the board, side by side.
# - *Break it*: leave out the division. `the gradient is 2 times too large, and there are 2 parts`. SGD would show it,
#   Adam not.
# - *Ask*: equal in every bit in float32? No: about half of the entries differ in the last digits, and nothing is
#   wrong.

# %% [markdown]
# | part | needs | could run elsewhere | notebook |
# |---|---|---|---|
# | forward and backward of some images | all parameters, those images | yes, if it has a copy of the parameters | 03 |
# | the sum of the gradients | every part's gradients | no: here the parts must talk | 02 |
# | the update of one entry | its gradient, its two moments | yes: any device may own any entries | 04 |
# | sending fc3's gradient | backward of fc3 | while fc2 and fc1 still compute | 03 |
# | forward of fc2 | the output of fc1 | yes, but it waits its turn | |
#
# Rows of a batch never meet in this network, except in the gradients. The blue lane and the orange lane could be
# two machines. (A network with batch normalisation would be another story: there, rows meet in the forward.)
#
# ## Is the gradient of a big batch the average of its parts?
#
# The picture claims that nothing is lost when a batch is cut. Prove it on one device first. Take the parts one
# after another and let their gradients add up in `.grad`. This is *gradient accumulation*, and people use it for
# its own sake: only one part's activations are in memory at a time.
#
# The loss is a mean over the batch. With $B$ images (count) in $k$ parts (count) of $B/k$ images each, and
# $\ell_i$ the loss of image $i$ (nats):
#
# $$ \frac{1}{B}\sum_{i=1}^{B} \nabla \ell_i \;=\; \frac{1}{k}\sum_{p=1}^{k} \Big( \frac{k}{B} \sum_{i \in p}
# \nabla \ell_i \Big) $$
#
# In words: the gradient of the whole is the mean of the parts' gradients. Not their sum, which is what `backward()`
# leaves in `.grad`.
#
# ### Exercise 1.3 · Gradient accumulation  (★★, 4 min)
#
# Leave in `.grad` the gradient of the mean loss over the whole batch, but never send more than one part through the
# model at once. What `.grad` held before is forgotten. Do not update. The check compares in float64 to 1e-6 of the
# largest entry, and counts how many images each forward saw.

# %% [markdown] tags=["hints-1.3"]
# 1. Clear once, before the loop. Then for each part: forward, loss, backward. What has to be done to each part's
#    loss so that the sum of the parts' gradients comes out as their mean?
# 2. `images.chunk(parts)` and `labels.chunk(parts)` cut both in the same way. A gradient scales as its loss does.
# 3. `(F.cross_entropy(model(x), y) / parts).backward()` for each pair of chunks, after one `model.zero_grad()`.


# %% tags=["exercise-1.3"]
def accumulate_gradients(model, images, labels, parts):
    """Fill each `.grad` with the mean gradient over images [B, D], `parts` equal parts one after another."""
    ### BEGIN SOLUTION
    # ~ # TODO: clear; for each part of [B / parts, D]: forward, loss, backward. No update.
    # ~ raise NotImplementedError("exercise 1.3")
    model.zero_grad()
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        loss = F.cross_entropy(model(x), y) / parts
        loss.backward()
    ### END SOLUTION


check("1.3", accumulate_gradients)

# %% [markdown]
# **Predict.** On our network, in float32: will the accumulated gradient be equal to the big batch's in every bit?


# %% tags=["nbval-ignore-output"]
def flat_gradient(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()]).clone()


def relative_error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


accumulate, errors = mine("accumulate_gradients"), {}
for dtype in (torch.float64, torch.float32):
    torch.manual_seed(2)
    net, x = MLP().to(dtype), images.to(dtype)
    F.cross_entropy(net(x), labels).backward()
    whole = flat_gradient(net)
    accumulate(net, x, labels, parts=4)
    errors[dtype] = relative_error(flat_gradient(net), whole)
    differ = (flat_gradient(net) != whole).float().mean()
    print(f"{dtype}: largest difference {errors[dtype]:.0e}, {differ:.0%} of the entries differ in some bit")
assert errors[torch.float64] < 1e-6
net.zero_grad()
for x_part, y_part in zip(x.chunk(4), labels.chunk(4), strict=True):
    F.cross_entropy(net(x_part), y_part).backward()
print(f"without the division the gradient is {flat_gradient(net).norm() / whole.norm():.3f} times as long")

# %% [markdown] tags=["instructor"]
# **4 min.**
#
# - *Ask*: 4,000 images on three devices; what does one image of the smallest part weigh in the mean of means?
# - *Type*: the plain mean first: `sizes [7, 5]: the gradient is the plain mean of the parts' averages`. Then weigh by
#   len(x).
# - *Say*: nothing raised, the loss still falls. The last cell is off by hundreds of percent.

# %% [markdown]
# The sentence is proved far beyond 1e-6 in float64, and many entries differ all the same. Rounded sums depend on
# their order, and cutting the batch changes the order. float32 keeps 24 binary digits, so a rounding is about 6e-8
# of the number, and what you see is a few of those. Not a mistake, and not to be hunted: tests in this series
# compare in float64, or with a tolerance that is stated.
#
# Without the division by 4, the last line says, the gradient comes out four times too long. With
# plain SGD that is a learning rate four times too high, and you would notice. Adam divides by the size of the
# gradient, so it hides the mistake. That is why this series tests with SGD.
#
# ## What if the parts are not equal?
#
# 4,000 images on three devices: one has more. The last batch of an epoch: shorter. A part with few images then
# counts as much as a part with many, unless you weigh it.
#
# ### Exercise 1.4 · The batch, split unevenly  (★★, 4 min)
#
# The same as before, with the size of each part given. A size may be 0: a device that got no image.

# %% [markdown] tags=["hints-1.4"]
# 1. Say it for images, not for parts: every image must weigh $1/B$ in the end. What does an image weigh in the
#    mean over its part?
# 2. A part of $n$ images has the weight $n/B$. `images.split(sizes)` cuts into pieces of these sizes.
# 3. Either `F.cross_entropy(model(x), y) * len(x) / len(images)`, or sum instead of averaging:
#    `F.cross_entropy(model(x), y, reduction="sum") / len(images)`.


# %% tags=["exercise-1.4"]
def accumulate_uneven(model, images, labels, sizes):
    """Fill each `.grad` with the mean gradient over images [B, D]; part i has sizes[i] images, in order."""
    ### BEGIN SOLUTION
    # ~ # TODO: clear; for each part [sizes[i], D]: forward, weighted loss, backward. No update.
    # ~ raise NotImplementedError("exercise 1.4")
    model.zero_grad()
    for x, y in zip(images.split(sizes), labels.split(sizes), strict=True):
        if len(x):
            loss = F.cross_entropy(model(x), y, reduction="sum") / len(images)
            loss.backward()
    ### END SOLUTION


check("1.4", accumulate_uneven)

# %% [markdown]
# How wrong is the plain mean of the parts' means? Three parts, one of them small:

# %% tags=["nbval-ignore-output"]
torch.manual_seed(4)
net, x, part_sizes = MLP().double(), images.double(), [150, 100, 6]
F.cross_entropy(net(x), labels).backward()
whole = flat_gradient(net)
mine("accumulate_uneven")(net, x, labels, part_sizes)
print(f"weighted by size: off by {relative_error(flat_gradient(net), whole):.0e} of the largest entry")
net.zero_grad()
for x_part, y_part in zip(x.split(part_sizes), labels.split(part_sizes), strict=True):
    (F.cross_entropy(net(x_part), y_part) / 3).backward()
mean_of_means_error = relative_error(flat_gradient(net), whole)
print(f"mean of means:    off by {mean_of_means_error:.0%} of the largest entry")

# %% [markdown] tags=["instructor"]
# **1 min.**
#
# - *Say*: the last line of the recap, do the parts on different machines, is the next three notebooks.
# - *Ask*: what must those machines tell each other? One word is enough: gradients.

# %% [markdown]
# The six images of the small part counted as much as a hundred and fifty others. No error was raised, and the loss
# would still go down. Notebook 03 meets this again, with real ranks.
#
# ## Recap
#
# - Training in float32 with Adam holds 16 bytes per parameter, plus activations that grow with the batch.
# - A backward has twice its forward's FLOPs, less the first layer's input gradient. Time follows FLOPs only where
#   arithmetic is what takes long.
# - Tensors are views of storages. What is sent has to lie side by side, so lists are flattened, or born flat.
# - Rows of a batch are independent until the gradients are summed; entries are independent in the update.
# - The gradient of a big batch is the average of its parts' gradients, weighted by their sizes. Do the parts on
#   different machines, and that sentence is data parallelism.

# %% tags=["measures", "key-figures", "nbval-ignore-output"]
print(f"test accuracy {test_accuracy:.1%}, trained on {len(data.train_images):,} images in {train_s:.0f} s")
print(f"held per parameter: {sum(held.values()) / num_parameters:.1f} bytes without activations")
print(f"activations of {B} images: {formula_bytes:,} bytes, {ratio:.2f} times the parameters")
print(f"backward FLOPs / forward FLOPs: {flop_ratio:.4f}")
print(f"flatten 6 gradients and back: {flatten_share:.0%} of a training step")
print(
    f"big batch against 4 parts: {errors[torch.float64]:.0e} in float64, {errors[torch.float32]:.0e} in float32"
)

# %% [markdown] tags=["instructor"]
# **0 min.**
#
# - *Say*: stop here. The references are for home.

# %% [markdown]
# ## What breaks next
#
# Put half B of the batch into a second process. It shares no memory with the first: it has parameters of its own,
# and gradients that the first process cannot see. How do processes that share nothing agree on a sum, and what
# does it cost? That is [notebook 02](02_all_reduce.ipynb).
#
# ## References
#
# - Kingma, Ba 2015, *Adam: a method for stochastic optimization*, [arXiv:1412.6980](https://arxiv.org/abs/1412.6980)
# - Li, Farkhoor, Liu, Yosinski 2018, *Measuring the intrinsic dimension of objective landscapes*, whose network
#   with two layers of 200 this is, [arXiv:1804.08838](https://arxiv.org/abs/1804.08838)
# - PyTorch, [hooks for saved tensors](https://docs.pytorch.org/tutorials/intermediate/autograd_saved_tensors_hooks_tutorial.html)
#   and [tensor views](https://docs.pytorch.org/docs/stable/tensor_view.html)
