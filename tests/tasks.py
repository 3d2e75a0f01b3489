"""The fields of a `Spec` that is about a binary task, for the tests of those."""


def task(groups="5,7 vs 2,4", pi=(0.7, 0.85), num_images=100):
    return {
        "noise": "binary",
        "noise_rate": None,
        "task": groups,
        "pi": pi,
        "num_images": num_images,
    }
