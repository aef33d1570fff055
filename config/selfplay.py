"""
Self-play: a model learns tic-tac-toe by playing both sides of it, in bytes (SPIRAL, arXiv
2506.24119). A game is a text, its moves, digits from 1 to 9. First the model learns random games as
any text; then it plays itself, and REINFORCE makes a winner's moves likelier: a result counts
relative to the running mean of its role's results. The second command asks for the moves so far.

    python -m config.selfplay    # all of it, and a control with random games only
    python sample.py --out_dir=config/selfplay.py --temperature=0 --max_new_bytes=1
"""
from functools import lru_cache

import torch
import torch.nn.functional as F

from model import SEPARATOR, Cache, pick

out_dir = "out/selfplay"
init_from = "out/games/ckpt.pt"
dataset = "games"
patcher = "fixed:1"
block_size = max_patches = n_embd = d_byte = 64
batch_size = 32  # about as many random games as are played in an update
n_layer = 3
n_head = 2
n_ngram = 4000
max_iters = 1500
learning_rate = 0.002
adam_learning_rate = 0.001
eval_interval = 1_000_000  # only at the end: best.pt is to be the last
compile = False  # each move is another shape
device = "cpu"   # the games are so small

GAMES = 256         # played at once
ILLEGAL = -1.5      # the result of who makes an illegal move; a loss is -1
ENTROPY = 0.08      # weight of the entropy of the moves: keeps it from playing one game only
ONE = ord("1") + 256  # the symbol of the first square
LINES = torch.tensor([[*map(int, line)] for line in "012 345 678 036 147 258 048 246".split()])


def play(players, n, n_mixed=0):
    """Plays n games of two players, functions of the moves so far (n, t) and the board (n, 9), 1 =
    own, -1 = the other's; half of the first n_mixed moves are random instead. Returns the moves
    (n, 9), -1 after the end, and the results of X, who begins, and of O (n, 2)."""
    moves, board = torch.full((n, 9), -1), torch.zeros(n, 9, dtype=torch.long)
    results, running = torch.zeros(n, 2), torch.ones(n, dtype=torch.bool)
    for t in range(9):
        move = players[t % 2](moves[:, :t], board)
        if t < n_mixed:
            move = torch.where(torch.rand(n) < 0.5, move, random_player(moves, board))
        moves[running, t] = move[running]
        legal = (0 <= move) & (move < 9) & (board.gather(1, move.clamp(0, 8)[:, None])[:, 0] == 0)
        results[running & ~legal, t % 2] = ILLEGAL
        running &= legal
        board[running, move[running]] = 1
        won = running & (board[:, LINES].sum(-1) == 3).any(-1)
        results[won, t % 2], results[won, 1 - t % 2] = 1, -1
        running &= ~won
        board = -board  # it is the other's turn
    return moves, results


def random_player(moves, board):
    return torch.multinomial((board == 0).float() + 1e-9, 1)[:, 0]


@lru_cache(None)
def solve(board):
    """The result of who is to move, with the 1s, if both play perfectly, and the moves for it."""
    if any(all(board[i] == -1 for i in line) for line in LINES.tolist()):
        return -1, []
    values = {i: -solve(tuple(-square for square in (*board[:i], 1, *board[i + 1 :])))[0]
              for i in range(9) if board[i] == 0}
    best = max(values.values(), default=0)
    return best, [i for i in values if values[i] == best]


def perfect_player(moves, board):
    best = [solve(tuple(row))[1] or [0] for row in board.tolist()]
    return torch.tensor([squares[torch.randint(len(squares), ())] for squares in best])


def as_symbols(moves):  # (n, t) to (n, 1 + t)
    return F.pad((moves.clamp(min=0) + ONE) % 512, (1, 0), value=SEPARATOR)


class ModelPlayer:  # a new one for each play()
    def __init__(self, model, temperature=1.0):
        self.model, self.temperature, self.cache = model, temperature, None

    @torch.no_grad()
    def __call__(self, moves, board):
        x = as_symbols(moves)
        if self.cache is None:
            self.cache = Cache(len(x), block_size, x.device)
            logits = self.model(x, cache=self.cache)[:, -1]
        for symbol in x[:, self.cache.n :].unbind(1):
            logits = self.model.step(symbol, self.cache)
        return (pick(logits, self.temperature) - ONE) % 512  # 9 to 511 are illegal


def edit(model):
    model.register_buffer("role_means", torch.zeros(2))  # running means of the results of X and O


def loss(model, x, y):
    n_mixed = int(torch.randint(6, ()))  # so that it meets every kind of board
    moves, results = play([ModelPlayer(model)] * 2, GAMES, n_mixed)
    model.role_means.lerp_(results.mean(0), 0.05)
    advantage = (results - model.role_means).repeat(1, 5)[:, :9]  # (GAMES, 9) X, O, X, ...
    symbols = as_symbols(moves)  # (GAMES, 10)
    log_p = model(symbols[:, :-1]).log_softmax(-1)  # (GAMES, 9, 512)
    entropy = -(log_p.exp() * log_p).sum(-1)  # (GAMES, 9)
    log_p = log_p.gather(-1, symbols[:, 1:, None])[..., 0]
    own = (moves != -1) & (torch.arange(9) >= n_mixed)  # the moves that are all the model's
    return -((advantage * log_p + ENTROPY * entropy) * own).sum() / GAMES


if __name__ == "__main__":
    import os, prepare, sample, train
    os.makedirs("data", exist_ok=True)
    with open("data/games.jsonl", "w") as file:
        for game in (play([random_player] * 2, 20_000)[0] + 1).tolist():
            print('{"text": "%s"}' % "".join(map(str, filter(None, game))), file=file)
    prepare.prepare(["data/games.jsonl"], dataset, patcher)
    given, hooks = train.parse([__file__])
    train.train(given | {"out_dir": "out/games", "init_from": "", "max_iters": 300})
    train.train(given | {"out_dir": "out/more_games"})
    train.train(given, hooks)
    for name in "out/games", "out/more_games", __file__:
        print(f"{name}, of 1,000 games: won, drawn, lost, illegal")
        for other in random_player, perfect_player:
            for role in 0, 1:
                own = ModelPlayer(sample.load(name, device), temperature=0)
                results = play([(own, other), (other, own)][role], 1000)[1][:, role]
                counts = [(results == result).sum().item() for result in (1, 0, -1, ILLEGAL)]
                print(f"as {'XO'[role]} against {other.__name__}: {counts}")
