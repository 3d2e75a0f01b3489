"""Mistakes that a student may make: (question, what the solution says, what they say).

Each must lose points in its own question and in no other.
"""

NOISE = [
    # all wrong labels go to one class
    ("q1", "T_01 = 0.1", "T_01 = 0.3"),
    # rows and columns swapped: labelled i - 1
    ("q2", "dims=1", "dims=0"),
    ("q3", "T[true_labels]", "T.T[true_labels]"),
    # right, but one label at a time
    (
        "q3",
        "torch.multinomial(T[true_labels], 1, generator=generator).squeeze(1)",
        "torch.tensor([int(T[k].multinomial(1, generator=generator))"
        " for k in true_labels])",
    ),
    # the generator says only where another one starts, so each call draws the same
    (
        "q3",
        "return torch.multinomial(T[true_labels], 1, generator=generator)",
        "torch.manual_seed(generator.initial_seed())\n"
        "    return torch.multinomial(T[true_labels], 1)",
    ),
    # the columns sum to 1 still
    ("q4", "counts.sum(dim=1, keepdim=True)", "counts.sum(dim=0)"),
    # errors fall with the root of n
    ("q5", "times_as_many = 4", "times_as_many = 2"),
    # less than half is not yet less than another
    ("q6", "lost = [1, 3]", "lost = [0, 1, 2, 3, 4]"),
    # the truth chooses the epoch
    ("q7", 'val = history["val_accuracy"]', 'val = history["test_accuracy"]'),
    # the truth chooses among epochs that tie
    (
        "q7",
        'history["test_accuracy"][val.index(max(val))]',
        'max(zip(val, history["test_accuracy"]))[1]',
    ),
    ("q8", 'why = "b"', 'why = "a"'),
]

LOSS_CORRECTION = [
    # Cross-entropy's slope with the wrong sign.
    ("q1", "slope_wrong = 0.02 - 1", "slope_wrong = 1 - 0.02"),
    # The division by q forgotten, which only scales the loss of each q.
    ("q2", "return (1 - p_y**q) / q", "return 1 - p_y**q"),
    # Nothing to learn from: no gradient reaches the network.
    ("q2", "logits.softmax(dim=1)", "logits.detach().softmax(dim=1)"),
    # (N, 1), which becomes (N, N) where each image has a weight.
    ("q2", "gather(1, labels[:, None]).squeeze(1)", "gather(1, labels[:, None])"),
    # Symmetric for two classes only.
    (
        "q3",
        'symmetric = ["mean absolute error", "unhinged, others -1/3"]',
        'symmetric = ["mean absolute error", "sigmoid, others -1"]',
    ),
    # One of the two bugs left in.
    ("q4", "mixed = p @ T", "mixed = p @ T.T"),
    # No gradient, and (N, 1), as in question 2.
    ("q4", "def forward_loss", "@torch.no_grad()\ndef forward_loss"),
    (
        "q4",
        "-mixed[range(len(labels)), labels].log()",
        "-mixed.gather(1, labels[:, None]).log()",
    ),
    # The off-diagonal entries of the inverse exchanged.
    (
        "q5",
        "T_inverse = [[1.2, -0.2], [-0.8, 1.8]]",
        "T_inverse = [[1.2, -0.8], [-0.2, 1.8]]",
    ),
    # More than a probability can be, clipped at the wrong place.
    ("q6", "told_more_sure = 1.0", "told_more_sure = 0.77"),
    # The sorted probabilities of each class themselves, not the image that has them.
    (
        "q7",
        "return probs[probs.argsort(dim=0)[place]]",
        "return probs.sort(dim=0).values[[place] * probs.shape[1]]",
    ),
    # What validates best is taken for what is best on clean images.
    ("q8", "chosen = max(best, key=best.get)", "chosen = max(last, key=last.get)"),
]

TWO_STAGE = [
    # The 10 % taken from images that the network does not predict to be of the class.
    ("q1", 'kept_dog = ["f", "h"]', 'kept_dog = ["f", "g"]'),
    # Sure, whatever the label says.
    ("q2", "return (predicted == labels) & (p >= 0.9)", "return p >= 0.9"),
    # What is counted for the report taken for a leak.
    ("q2", 'leaks = ["b", "d"]', 'leaks = ["b", "c", "d"]'),
    # Recall over all images, not over the right labels.
    ("q3", 'screening["correct"] / (1 - realised_rate)', 'screening["correct"] / 1.0'),
    # The ramp's square forgotten.
    ("q4", "half_at = 1 - math.sqrt(math.log(2) / 5)", "half_at = 1 - math.log(2) / 5"),
    # The mean over the classes as well as over the images.
    ("q5", ".square().sum(dim=1)", ".square().mean(dim=1)"),
    # The target goes on carrying gradients.
    ("q5", "target.detach()", "target"),
    # The labels teach nothing.
    ("q5", "nats[kept].mean()", "nats[kept].mean().detach()"),
    # The caller's labels are gone afterwards.
    ("q5", "nats = torch.nn", "labels[~kept] = -100\n    nats = torch.nn"),
    # The rows divided instead of the columns.
    (
        "q6",
        "return (T / (shares @ T)).argmax(dim=1)",
        "return (T / (T @ shares)[:, None]).argmax(dim=1)",
    ),
    # The arrow from 6 to 5 overlooked.
    (
        "q7",
        "majority_figure = float(1 - shares[[2, 3, 5, 6, 7]].sum())",
        "majority_figure = float(1 - shares[[2, 3, 5, 7]].sum())",
    ),
    # Precision over all images with the label, not over the kept ones.
    (
        "q8",
        "five_or_six = kept & ((noisy == 5) | (noisy == 6))",
        "five_or_six = (noisy == 5) | (noisy == 6)",
    ),
]

SELF_LEARNING = [
    # the cosine to the sum of the prototypes as they are: the longer one counts more
    ("q1", "sigma_1 = (0.8 + 0.96) / 2", "sigma_1 = 56 / 5 / 128**0.5"),
    # an image that is only as dense counts as denser
    ("q2", "[0.80, 0.95, 0.25, 0.60, 0.65]", "[0.90, 0.95, 0.25, 0.60, 0.65]"),
    # the same in the function
    ("q3", "rho[None, :] > rho[:, None]", "rho[None, :] >= rho[:, None]"),
    # the least dense first
    ("q4", "-float(rho[i])", "float(rho[i])"),
    # the mean is brought to length 1, in place of each prototype
    (
        "q5",
        "F.normalize(prototypes, dim=-1).mean(dim=1)",
        "F.normalize(prototypes.mean(dim=1), dim=-1)",
    ),
    # alpha weighs the given label
    (
        "q6",
        "(1 - alpha) * on_given + alpha * on_corrected",
        "alpha * on_given + (1 - alpha) * on_corrected",
    ),
    # nothing to learn from: no gradient reaches the network
    ("q6", "def total_loss", "@torch.no_grad()\ndef total_loss"),
    (
        "q6",
        "(1 - alpha) * on_given + alpha * on_corrected",
        "((1 - alpha) * on_given + alpha * on_corrected).item()",
    ),
    # a share of all labels, in place of the wrong ones
    ("q7", "is_right[~was_right].double()", "(is_right & ~was_right).double()"),
    # the truth chooses
    ("q8", '["history"]["val_accuracy"]', '["history"]["test_accuracy"]'),
    # the sign
    ("q9", "shares[-1] - shares[0]", "shares[0] - shares[-1]"),
    # a prediction that was not corrected
    ("q9", 'more_to_gain = "pair-flip"', 'more_to_gain = "symmetric"'),
]

NOISE_MODEL = [
    # the row of C in place of the column of the truth
    ("q1", "if_confusing = 0.8", "if_confusing = 0.9"),
    # the truth stays in the rows
    ("q2", "T.T.clone()", "T.clone()"),
    # the posterior overrules the label where the class network alone would
    ("q3", "overruled_above = 0.5 / (0.5 + 0.3 / 2 + 0.2)", "overruled_above = 0.5"),
    # label and truth swapped in the three matrices
    ("q4", "of_label[:, y_noisy]", "of_label.mT[:, y_noisy]"),
    # a gradient through the posterior
    ("q5", "q_y.detach()", "q_y"),
    # probabilities counted without the sum that binds them
    ("q6", "numbers_to_find = 11", "numbers_to_find = 13"),
    # confusing labels alone are suspected
    ("q7", "q_z[:, 0].argsort()", "q_z[:, 2].argsort(descending=True)"),
    # random labels alone are
    ("q7", "q_z[:, 0].argsort()", "q_z[:, 1].argsort(descending=True)"),
    # the more probable of the two, in place of both together
    ("q7", "q_z[:, 0].argsort()", "q_z[:, 1:].amax(1).argsort(descending=True)"),
    # the most certainly right ones first
    ("q8", "first = z[:, 0].argsort()", "first = z[:, 0].argsort(descending=True)"),
    # a prediction that was not corrected
    ("q8", 'em_helps_under = "symmetric"', 'em_helps_under = "confusing"'),
    # the two priors swapped
    ("q9", "delta_P = 0.4 / 1.2", "delta_P = 0.2 / 0.8"),
]

WRONG = {
    "noise": NOISE,
    "loss_correction": LOSS_CORRECTION,
    "two_stage": TWO_STAGE,
    "self_learning": SELF_LEARNING,
    "noise_model": NOISE_MODEL,
}
