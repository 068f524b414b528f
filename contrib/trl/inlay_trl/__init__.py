"""TRL's trainers for models with an attached stack: TRL's own, with what `inlay_train` adds to a Trainer."""

from inlay_trl.trainers import DPOTrainer, RewardTrainer, SFTTrainer

__all__ = ["DPOTrainer", "RewardTrainer", "SFTTrainer"]
