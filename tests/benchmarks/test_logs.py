"""Every peer's log becomes steps with losses. The lines are from real runs, with other output around them."""

import json
from pathlib import Path

import pytest

from benchmarks.peers import hugging_face, ours
from benchmarks.peers.case import Step
from benchmarks.peers.compare import peer_of
from benchmarks.peers.process import Finished
from benchmarks.peers.turn import steps

TRL = """\
 20%|██        | 1/5 [00:07<00:31,  7.86s/it]
{'loss': '4.712', 'grad_norm': '3.815', 'learning_rate': '0.0001', 'entropy': '3.273', 'mean_token_accuracy': '0.3582', 'num_tokens': '388', 'epoch': '0.2'}
 40%|████      | 2/5 [00:14<00:21,  7.03s/it]
{'loss': '5.529', 'grad_norm': '5.597', 'learning_rate': '0.0001', 'entropy': '3.194', 'mean_token_accuracy': '0.234', 'num_tokens': '748', 'epoch': '0.4'}
{'train_runtime': '41.31', 'train_samples_per_second': '0.968', 'train_loss': '5.021', 'epoch': '1'}
"""  # noqa: E501 - lines as they were

LLAMAFACTORY = """\
{'loss': '4.904', 'grad_norm': '3.351', 'learning_rate': '0.0001', 'epoch': '0.25'}
{'loss': '4.983', 'grad_norm': '8.652', 'learning_rate': '0.0001', 'epoch': '0.5'}
{'train_runtime': '171.2', 'train_samples_per_second': '0.047', 'train_steps_per_second': '0.023', 'train_loss': '4.9'}
"""

MS_SWIFT = """\
{'loss': '5.029', 'grad_norm': '3.422', 'learning_rate': '0.0001', 'token_acc': '0.2273', 'epoch': '0.25', 'global_step/max_steps': '1/4', 'elapsed_time': '24s', 'remaining_time': '1m 12s', 'train_speed(s/it)': '23.93'}
{'loss': '5.477', 'grad_norm': '9.246', 'learning_rate': '0.0001', 'token_acc': '0.4', 'epoch': '0.5', 'global_step/max_steps': '2/4', 'elapsed_time': '36s', 'remaining_time': '36s', 'train_speed(s/it)': '17.8'}
"""  # noqa: E501 - lines as they were

TORCHTUNE = """\
1|1|Loss: 5.02912712097168:  25%|██▌       | 1/4 [01:05<03:15, 65.18s/it]Step 1 | loss:5.02912712097168 lr:0.0001 tokens_per_second_per_gpu:0.336961030960083 grad_norm:3.20171737670898
1|2|Loss: 5.481335639953613:  50%|█████     | 2/4 [02:03<02:02, 61.30s/it]Step 2 | loss:5.481335639953613 lr:0.0001 tokens_per_second_per_gpu:0.17098528146743774 grad_norm:8.881563
"""  # noqa: E501 - lines as they were

LITGPT = """\
Verifying settings ...
Epoch 1 | iter 1 step 1 | loss train: 5.029, val: n/a | iter time: 9891.22 ms (step)
Epoch 1 | iter 2 step 2 | loss train: 5.684, val: n/a | iter time: 13729.91 ms (step)
"""

OURS = """\
{"step": 1, "loss": 4.711957789179104, "lr": 0.0001, "labelled_tokens": 67, "real_tokens": 388}
{"step": 2, "loss": 5.5286995096409575, "lr": 0.0001, "labelled_tokens": 47, "real_tokens": 360}
"""


@pytest.mark.parametrize(
    ("name", "log", "losses"),
    [
        ("trl", TRL, [4.712, 5.529]),
        ("llamafactory", LLAMAFACTORY, [4.904, 4.983]),
        ("ms-swift", MS_SWIFT, [5.029, 5.477]),
        ("litgpt", LITGPT, [5.029, 5.684]),
        ("torchtune", TORCHTUNE, [5.02912712097168, 5.481335639953613]),
    ],
)
def test_a_peers_log(name: str, log: str, losses: list[float]) -> None:
    stamped = [(float(at), line) for at, line in enumerate(log.splitlines())]
    found = steps(peer_of(name), Finished(stamped, stamped, 0, 0, 1.0))
    assert [step for _, step in found] == [Step(at, loss) for at, loss in enumerate(losses, start=1)]
    assert [when for when, _ in found] == sorted({when for when, _ in found})


def test_our_own_metrics() -> None:
    stamped = [(float(at), line) for at, line in enumerate(OURS.splitlines())]
    found = steps(ours.PEER, Finished([], stamped, 0, 0, 1.0))
    assert [step.loss for _, step in found] == [4.711957789179104, 5.5286995096409575]


def test_numbers_may_be_printed_as_numbers() -> None:
    assert hugging_face.step_of("{'loss': 2.5, 'grad_norm': 1.0, 'epoch': 0.1}", 6) == Step(7, 2.5)
    assert hugging_face.step_of("{'eval_loss': 2.5}", 0) is None


def test_exact_losses_come_from_the_newest_state(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 4.71195793}, {"step": 2, "loss": 5.52869951}, {"step": 2, "train_loss": 5.0}]
    state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"log_history": history}))
    assert hugging_face.losses(tmp_path) == {1: 4.71195793, 2: 5.52869951}
    assert hugging_face.losses(tmp_path / "nowhere") == {}


def test_litgpts_exact_losses_come_from_its_csv(tmp_path: Path) -> None:
    rows = ["batches,epoch,iter,iter_time,learning_rate,lengths,loss,samples,step,time,tokens,total_tokens"]
    rows += ["1,,,,,108,,2,1,9.89,,", ",0,1,9.89,0.0001,,5.029127597808838,,1,,99,99"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.csv").write_text("\n".join(rows) + "\n")
    assert peer_of("litgpt").losses(tmp_path) == {1: 5.029127597808838}
