"""`make soak`: train the demo's model for half an hour while faults are put into it, started again as a user would.

    python tests/soak.py [--seconds 1800] [--seed 0] [--exact] [--short] [--out runs/soak]

The command is a pipeline of three stages (SFT from scratch, GRPO, a cold start: sampling, SFT; an evaluation after each),
run again and again. The first round is left alone, and not counted in --seconds. In the others a random fault (soak_kinds.py) comes every few seconds;
a run that ends by it is started again with the same command. Rounds with an odd number have only faults that
may not change a bit: they must end with the files of the first one. --exact: kills and damage alone.
Exit code 1 where an invariant was broken; which is said. docs/reliability.md gets the table of a soak of 10 minutes.
"""

import argparse
import ctypes
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import soak_report
from faults import DAMAGES
from soak_checks import Checks
from soak_kinds import FILLS_PAGE, KILL_AND_FLIP, KINDS, STOPPED, Deck, Kind
from soak_runs import DEADLINE, ROOT, STAGES, Runs, Size

from r1fast.progress import duration

SUBREAPER = 36  # prctl's PR_SET_CHILD_SUBREAPER: orphans of a run are ours, and seen
SLACK = 15.0  # seconds beyond a deadline, on a busy machine
FAULTS_A_ROUND = 16  # at most, in the time that a round takes when left alone
PATIENCE = 120.0  # seconds without a sign of life


class Soak:
    def __init__(self, seconds: float, seed: int, *, exact: bool, short: bool, out: Path):
        self.seconds, self.seed, self.exact, self.out = seconds, seed, exact, out
        self.size, self.rng = Size(short), random.Random(seed)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        ctypes.CDLL(None).prctl(SUBREAPER, 1)
        self.runs = Runs(out, self.size)
        self.checks = Checks(self.size, STAGES)
        self.began = self.said_at = time.monotonic()
        self.ends = 0.0  # known when the first round is over
        names = [k.name for k in KINDS if not (short and k.slow)]
        self.any_kind = Deck(names, self.rng)
        self.bitwise = Deck([k.name for k in KINDS if k.exact and k.name in names], self.rng)
        if exact:
            self.bitwise = Deck(list(KILL_AND_FLIP), self.rng)
        self.deck: Deck | None = None
        self.number, self.mean_gap = 0, self.size.gap
        self.folder = out
        self.stage, self.phase, self.step = "", "", 0
        self.is_training = self.has_begun = self.has_trained = False
        self.moved = 0.0
        self.fired = ""
        self.to_be_said = ""  # by the next run that trains

    # --- the whole

    def run(self) -> bool:
        """Whether no invariant was broken."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        old = [signal.signal(number, signal.default_int_handler) for number in numbers]
        try:
            while not self.number or self.left > 0:
                self.round()
                if not self.number:
                    took = time.monotonic() - self.began
                    self.ends = time.monotonic() + self.seconds
                    # on a slow machine rounds must come to an end too
                    self.mean_gap = max(self.size.gap, took / FAULTS_A_ROUND)
                self.number += 1
                if self.checks.num_broken > 5:
                    break
        except KeyboardInterrupt:
            self.say("stopped")
        finally:
            for number, handler in zip(numbers, old, strict=True):
                signal.signal(number, handler)
            self.runs.close()
            self.checks.temporary_files(self.runs.temp)
        return self.report()

    @property
    def left(self) -> float:
        """Seconds for faults."""
        return self.ends - time.monotonic()

    def round(self) -> None:
        """The command, until it is done or the time is up; then its files are looked at."""
        n, self.folder = self.number, self.out / f"round-{self.number}"
        bitwise = self.exact or n % 2 == 1
        self.deck = None if n == 0 else self.bitwise if bitwise else self.any_kind
        what = "left alone" if n == 0 else "kills and damage" if self.exact else "any fault"
        if bitwise and n and not self.exact:
            what = "faults that may change no bit"
        self.say(f"round {n}: {what}")
        self.checks.begin_round(n, self.folder, bitwise=bitwise and n > 0)
        done, begun = False, time.monotonic()
        while not done and (n == 0 or self.left > 0) and self.checks.num_broken <= 5:
            done = self.attempt()
        self.checks.end_round(done, time.monotonic() - begun)
        self.say(f"round {n}: {'done' if done else 'not done'}, {self.checks.last_round}")

    # --- one process

    def attempt(self) -> bool:
        """One start of the command; whether it was done then."""
        fresh = self.deck is not None and not self.size.short and self.rng.random() < 0.15
        self.runs.start(self.size.command(self.folder), fresh=fresh)
        self.checks.begin_run()
        self.stage, self.phase, self.is_training = "", "start", False
        self.has_begun = self.has_trained = False
        self.moved = time.monotonic()
        code, kind = None, None
        if fresh and self.rng.random() < 0.5:  # while it starts
            code = self.watch(self.rng.uniform(0.0, 6.0))
            if code is None and not self.has_begun:
                code, kind = self.interrupt_start()
        if code is None:  # its handlers are set
            code = self.watch(PATIENCE, until=lambda: self.has_begun)
        while code is None:
            code = self.watch(self.gap() if self.deck else 1.0)
            if code is None and self.deck:
                if self.left <= 0:
                    kind = next(k for k in KINDS if k.name == "SIGTERM")
                else:
                    kind = self.deck.draw(self.fits)
                code = self.inject(kind)
                if code is None or not self.fired:
                    kind = None  # it is no reason to end
        self.ended(code, kind)
        return code == 0

    def gap(self) -> float:
        return self.rng.uniform(0.2, 1.8) * self.mean_gap

    def interrupt_start(self) -> tuple[int | None, Kind]:
        number = self.rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        ends = (-number, STOPPED) if number != signal.SIGKILL else (-number,)
        kind = Kind(f"{signal.Signals(number).name} while it starts", "signal", ends, (number,))
        return self.inject(kind), kind

    def ended(self, code: int, kind: Kind | None) -> None:
        """What holds whenever a process has ended, by a fault or by itself."""
        log = self.runs.log.read_text(errors="replace")
        if self.to_be_said and (self.to_be_said in log or self.has_trained):
            if self.to_be_said not in log:
                self.broken(f"damage was not told: {self.to_be_said!r} is not in the log", log)
            self.to_be_said = ""
        if kind is None and code:
            self.broken(f"ended with exit code {code}, and no fault", log)
        self.checks.end_run(code, kind)
        began = time.monotonic()
        while (others := self.runs.others()) and time.monotonic() < began + 10:
            time.sleep(0.1)
        if others:
            self.broken(f"left processes behind: {'; '.join(others)}", log)
        if kind is not None and kind.how == "damage":
            self.damage(kind)

    def damage(self, kind: Kind) -> None:
        """To a file of the newest checkpoint, where there is one before it."""
        steps = self.checks.checkpoints(self.stage)
        if len(steps) < 2 or (self.folder / self.stage / "manifest.json").exists():
            self.checks.not_possible(kind)  # the kill alone was
            self.deck.put_back(kind)
            return
        path = self.rng.choice(sorted(steps[0].iterdir()))
        path.write_bytes(DAMAGES[kind.name](path.read_bytes()))
        self.to_be_said = kind.said
        self.checks.damaged(kind, self.stage)

    # --- one fault

    def fits(self, kind: Kind) -> bool:
        if kind.how == "damage":
            return self.is_training and len(self.checks.checkpoints(self.stage)) > 1
        return (not kind.training or self.is_training) and kind.stage in ("", self.stage)

    def inject(self, kind: Kind) -> int | None:
        """The exit code it came to; None where the run goes on, as it should, or it did not happen."""
        self.checks.before_fault()
        sent, self.fired = time.monotonic(), ""
        if kind.how == "child":
            fault = kind.order(self.rng)
            self.runs.order(fault)
            code = self.watch(20.0, until=lambda: bool(self.fired))
            if not self.fired and code is None:  # what it waits for did not come
                self.runs.order({"kind": "", "seed": 0})
                self.deck.put_back(kind)
                self.say(f"{self.stage[:10]:10} {self.phase}: no occasion for {kind.name}")
                return None
            if not self.fired and code != -signal.SIGKILL:  # it was done before
                self.deck.put_back(kind)
                return code
            self.fired, sent = kind.name, time.monotonic()
            lasts = fault["seconds"] if "no " in kind.name else 0.0
        else:
            self.fired = kind.name
            code, lasts = self.signal(kind), 0.0
        if code is None:
            code = self.outcome(kind, lasts)
        self.judge_end(code, kind, sent)
        return code

    def signal(self, kind: Kind) -> int | None:
        first, *more = kind.signals
        self.runs.send(first)
        wait = self.rng.uniform(0.3, self.size.stop) if first == signal.SIGSTOP else 0.4
        for number in more:
            code = self.watch(wait, stopped=first == signal.SIGSTOP)
            if code is not None:
                return code
            self.runs.send(number)
        return None

    def outcome(self, kind: Kind, lasts: float) -> int | None:
        """Wait until the run has ended, or has gone on and said what it should."""
        began = time.monotonic()
        goes_on = None in kind.ends

        def is_over() -> bool:
            if not goes_on or self.moved < began + lasts + 0.3:
                return False
            return not kind.said or kind.said in self.runs.log.read_text(errors="replace")

        code = self.watch(PATIENCE, until=is_over)
        if code is None and not is_over():
            log = self.runs.log.read_text(errors="replace")
            what = f"said nothing of {kind.said!r}" if goes_on else "did not end"
            self.broken(f"{kind.name}: {what}", log)
            self.runs.send(signal.SIGKILL)
            code = self.watch(PATIENCE)
        return code

    def judge_end(self, code: int | None, kind: Kind, sent: float) -> None:
        """Was that an end that the fault may have?"""
        seconds = time.monotonic() - sent
        log = self.runs.log.read_text(errors="replace")
        # it was done before, or went on to its end
        is_done = code == 0 and (kind.how == "signal" or None in kind.ends)
        right = code in kind.ends or is_done
        if not right:
            self.broken(f"{kind.name}: ended with {code}, not {kind.ends}", log)
        said = kind.said and kind.how != "damage" and code is not None
        if said and kind.said not in log:
            self.broken(f"{kind.name}: {kind.said!r} is not in the log", log)
        if code == STOPPED and seconds > DEADLINE + SLACK:
            self.broken(f"{kind.name}: took {seconds:.0f} s, deadline {DEADLINE:g} s", log)
        text = self.checks.fault(kind, code, self.stage, seconds, right)
        at = f"{self.step:>3}/{self.size.steps.get(self.stage, 0):<3}" if self.is_training else ""
        end = "goes on" if code is None else f"exit {code}"
        self.say(f"{(self.stage or self.phase)[:10]:10} {at:7} {kind.name:26} {end:8} {text}")

    # --- eyes and mouth

    def watch(self, seconds: float, until=lambda: False, *, stopped: bool = False) -> int | None:
        """Take in what the run tells, for so long or `until`. Its exit code, if it has ended."""
        end = time.monotonic() + seconds
        while True:
            for event in self.runs.told():
                self.take(event)
            if (code := self.runs.poll()) is not None:
                for event in self.runs.told():
                    self.take(event)
                return code
            now = time.monotonic()
            if until() or now > end:
                return None
            if now > self.moved + PATIENCE and not stopped:
                self.broken(
                    f"nothing has moved for {PATIENCE:g} s", self.runs.log.read_text()[-3000:]
                )
                self.runs.send(signal.SIGKILL)
                self.moved = now
            if now > self.said_at + 60:
                self.say(f"{self.stage} {self.phase}, step {self.step}: no fault for a minute")
            time.sleep(0.02)

    def take(self, event: dict) -> None:
        if event["pid"] != self.runs.pid:
            return  # of the one before
        self.moved = time.monotonic()
        what = event["is"]
        if what == "fault":
            self.fired = event["kind"]
        elif what == "begun":
            self.has_begun = True
        elif what == "beat":
            stage, _, part = event["stage"].partition(":")
            if stage != self.stage:
                self.stage, self.step = stage, 0
            self.phase = part.strip() or event["phase"]
            self.is_training = not part and event["phase"] not in ("done", "stopped")
            self.has_trained |= self.is_training
        elif what == "step":
            self.stage, self.step = event["stage"], event["step"]
            self.checks.step(event)
        elif what == "ended":
            self.is_training = False

    def say(self, text: str) -> None:
        self.said_at = time.monotonic()
        clock = int(self.said_at - self.began)
        print(f"{clock // 60:3}:{clock % 60:02} {text}"[:80].rstrip(), flush=True)

    def broken(self, what: str, log: str = "") -> None:
        self.say(f"BROKEN: {what}")
        number = self.checks.broken(f"round {self.number}, {self.stage} {self.step}: {what}")
        (self.out / f"broken-{number}.log").write_text(f"{what}\n\n{log}")

    def report(self) -> bool:
        result = self.checks.result(
            seconds=time.monotonic() - self.began, seed=self.seed, short=self.size.short,
            only_kills=self.exact,
        )  # fmt: skip
        (self.out / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
        print(soak_report.terminal(result))
        print(f"{duration(result['seconds'])}; {self.out / 'soak.json'}", flush=True)
        return not result["broken"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--exact", action="store_true", help="kills and damage alone, all bit by bit"
    )
    parser.add_argument(
        "--short", action="store_true", help="small rounds, many faults: for a test"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "soak")
    o = parser.parse_args()
    soak = Soak(o.seconds, o.seed, exact=o.exact, short=o.short, out=o.out.resolve())
    held = soak.run()
    if o.seconds >= FILLS_PAGE and not o.exact and not o.short:
        soak_report.fill_page(json.loads((soak.out / "soak.json").read_text()))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
