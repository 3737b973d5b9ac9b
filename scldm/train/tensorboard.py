"""A run in TensorBoard: `tracking.also=scldm.train.tensorboard:TensorBoard`, then `tensorboard --logdir runs`."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from scldm.train.follower import Follower


class TensorBoard(Follower):
    """Rows as scalars SPLIT/METRIC by step, and the resolved configuration as text, in RUN/tensorboard."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        if (folder / "config.json").is_file():
            self.writer.add_text("config.json", f"```\n{(folder / 'config.json').read_text()}\n```")

    def send(self) -> None:
        for rows in self.new_rows():
            for row in rows:
                step, time, split = row.pop("step"), row.pop("time"), row.pop("split")
                for name, value in row.items():
                    if value is not None:
                        self.writer.add_scalar(f"{split}/{name}", value, step, walltime=time)
            self.writer.flush()  # before they count as sent
