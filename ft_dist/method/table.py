"""`method.kind` -> the method."""

from ft_dist.method.full import Full
from ft_dist.method.lora import Lora
from ft_dist.method.protocol import Method

METHODS: dict[str, Method] = {
    "full": Full(),
    "lora": Lora(),
}
