"""The verbs of the `scldm` command, and the presets that each takes."""

# verb -> (module, what it does, in one line)
VERBS = {
    "quickstart": ("launch.quickstart", "the whole path, from cells to a report, on one small set of real cells"),
    "soma write": ("launch.soma_write", "write an h5ad file's counts as SOMA, laid out as the Census"),
    "shards write": ("launch.shards_write", "turn an atlas (h5ad, SOMA, Census) into shuffled training shards"),
    "shards verify": ("launch.shards_verify", "check every byte of a shard set, and cells against their sources"),
    "shards info": ("launch.shards_info", "print what a shard set holds, or draw it as a page"),
    "train vae": ("launch.train_vae", "train the autoencoder on shards"),
    "encode": ("launch.encode", "encode every cell of a shard set once, as latent shards"),
    "train ldm": ("launch.train_ldm", "train the latent diffusion model on latent shards"),
    "checkpoint inspect": ("launch.checkpoint_inspect", "print what a checkpoint holds"),
    "checkpoint verify": ("launch.checkpoint_verify", "check every byte of a run's checkpoints"),
    "checkpoint convert": ("launch.checkpoint_convert", "write a checkpoint as plain weights, or in other parts"),
    "plan": ("launch.plan", "say what a training run will take, before a GPU is touched"),
    "export": ("launch.export", "write trained runs as a model folder that scldm.load reads"),
    "generate": ("launch.generate", "generate cells for given conditions"),
    "transform": ("launch.transform", "take the cells of an h5ad file to other conditions"),
    "embed": ("launch.embed", "embed the cells of an h5ad file"),
    "reconstruct": ("launch.reconstruct", "expected expression and log-likelihood of the cells of an h5ad file"),
    "evaluate": ("launch.evaluate", "compare generated cells with real ones: metrics, figures, report"),
    "submit": ("launch.cluster.submit", "run a verb, or the whole path, as Slurm jobs on many nodes"),
    "status": ("launch.cluster.status", "how far a run is: state, step, cells/s, time left, last checkpoint, errors"),
    "logs": ("launch.cluster.logs", "follow the log of a run that was submitted"),
    "report": ("launch.report", "one page on a training run, or on two beside each other"),
    "track replay": ("launch.track_replay", "send to MLflow what it lacks of runs, from their folders"),
    "completion": ("launch.completion", "print a script that completes verbs, presets and keys in bash or zsh"),
}

# those that may be stages of something larger, which has failed if one of them has
STAGES = ("soma write", "shards write", "train vae", "encode", "train ldm", "export", "generate")
STAGES += ("transform", "embed", "reconstruct", "evaluate")

# verb -> the groups of presets that are for it. The others take a path to a YAML file alone
PRESETS = {
    "shards write": ("data",),
    "train vae": ("vae", "hardware"),
    "train ldm": ("ldm", "hardware"),
    "plan": ("vae", "ldm", "hardware"),
    "generate": ("sampler",),
    "transform": ("sampler",),
}
