"""Who leads: timeouts, pre-votes, votes, stickiness, check-quorum (Raft §5.2, §5.4.1; thesis §4.2.3, §9.6).

A vote is given once a term and only to a log at least as up to date as one's own; it leaves, and a candidate's
own counts, only once it is on disk. Never does a pre-vote change anybody's term or vote.
"""

from __future__ import annotations

from raftkv.raft.actions import Send
from raftkv.raft.messages import Message, RequestVote, VoteReply
from raftkv.raft.progress import Progress
from raftkv.raft.quorum import VoteResult, quorum_value, vote_result
from raftkv.raft.state import CANDIDATE, FOLLOWER, LEADER, NEVER_MS, PRECANDIDATE, Node


class Election:
    """The election timer, the votes of the campaign under way, and the leader's own right to lead."""

    __slots__ = (
        "contact_ms",
        "counted",
        "deadline_ms",
        "node",
        "own_counts",
        "own_vote_seq",
        "silent",
        "sticky_until_ms",
        "timeout_ms",
        "votes",
    )

    def __init__(self, node: Node) -> None:
        self.node = node
        self.votes: dict[int, bool] = {}
        self.own_vote_seq = 0
        """The Persist with the candidate's vote for itself; 0 when there is none to wait for."""
        self.counted: list[Progress] = []
        """Leader: the progress of every other voter whose word counts."""
        self.own_counts = False
        self.silent: list[int] = []
        """Leader: a -1 for each voter whose word does not."""
        self.contact_ms = -NEVER_MS
        """When this follower last heard its leader."""
        # An earlier incarnation may have acknowledged a round that a lease still rests on.
        self.sticky_until_ms = node.now_ms + node.config.election_timeout_ms_min if node.config.lease_reads else 0
        self.timeout_ms = 0
        self.deadline_ms = 0
        self.restart_timer()

    # ---- time

    def restart_timer(self) -> None:
        """A new random timeout, from now (Raft §5.2: split votes are rare, and resolved quickly)."""
        config = self.node.config
        spread = config.election_timeout_ms_max - config.election_timeout_ms_min
        self.timeout_ms = config.election_timeout_ms_min + int(self.node.rng.random() * (spread + 1))
        self.deadline_ms = self.node.now_ms + self.timeout_ms

    def heard_leader(self) -> None:
        self.contact_ms = self.node.now_ms
        self.deadline_ms = self.node.now_ms + self.timeout_ms

    def tick(self) -> None:
        """Campaign if no leader was heard for a whole timeout."""
        if self.node.now_ms < self.deadline_ms:
            return
        if self.may_campaign():
            self.campaign(pre=self.node.config.pre_vote, transfer=False)
        else:
            self.restart_timer()

    def may_campaign(self) -> bool:
        """Only a voter, by the newest membership in its log, whose state isn't being replaced."""
        return self.node.is_voter and not self.node.installing

    def check_quorum(self) -> None:
        """Leader: step down when no quorum was heard for an election timeout (thesis §6.2)."""
        node = self.node
        if not node.config.check_quorum:
            return
        heard_ms = self.quorum_of([p.last_heard_ms for p in self.counted], node.now_ms)
        if node.now_ms - heard_ms >= node.config.election_timeout_ms_max:
            node.become_follower(node.term, None)

    def recount(self) -> None:
        """Leader: members, or whose word counts, have changed."""
        node = self.node
        progress = node.progress
        voters = node.membership.voters
        self.counted = [p for v in voters if (p := progress.get(v)) is not None and not p.regressed]
        self.own_counts = node.is_voter
        self.silent = [-1] * (len(voters) - len(self.counted) - self.own_counts)

    def quorum_of(self, values: list[int], own: int) -> int:
        """What a majority of the voters has reached: `values` are those of `counted`, in any order."""
        if self.own_counts:
            values.append(own)
        if self.silent:
            values += self.silent
        return quorum_value(values)

    # ---- campaigning

    def campaign(self, *, pre: bool, transfer: bool) -> None:
        """Ask for votes, in the next term; a pre-vote only asks whether asking would be of use."""
        node = self.node
        self.votes = {}
        if pre:
            self.own_vote_seq = 0
            self.votes[node.replica] = True
            term = node.term + 1
            node.reads.fail_unconfirmed()
            node.set_role(PRECANDIDATE, None)
        else:
            term = node.term + 1
            node.set_hard_state(term, node.replica)
            self.own_vote_seq = node.next_seq
            node.reads.fail_unconfirmed()
            node.set_role(CANDIDATE, None)
        self.restart_timer()
        request = RequestVote(term, node.replica, node.log.last_index, node.log.last_term, pre, transfer)
        for voter in node.membership.voters:
            if voter != node.replica:
                node.send(voter, request)
        self._count()

    def persisted(self) -> None:
        """The candidate's own vote counts once it is on disk, if it is still wanted."""
        node = self.node
        if node.role == CANDIDATE and 0 < self.own_vote_seq <= node.persisted_seq:
            self.own_vote_seq = 0
            self.votes[node.replica] = True
            self._count()

    def on_reply(self, message: VoteReply) -> None:
        """A vote counts in the campaign that asked for it: same kind, same term."""
        node = self.node
        if node.role == PRECANDIDATE and message.pre:
            if message.granted and message.term != node.term + 1:
                return
        elif node.role != CANDIDATE or message.pre:
            return
        self.votes.setdefault(message.source, message.granted)
        self._count()

    def _count(self) -> None:
        node = self.node
        result = vote_result(node.membership.voters, self.votes)
        if result is VoteResult.WON:
            if node.role == PRECANDIDATE:
                self.campaign(pre=False, transfer=False)
            else:
                self.become_leader()
        elif result is VoteResult.LOST:
            node.become_follower(node.term, None)

    def become_leader(self) -> None:
        """Open the term with a no-op (Raft §8): what earlier terms left behind commits with it."""
        node = self.node
        assert node.role == CANDIDATE and node.is_voter
        node.progress = {}
        node.set_role(LEADER, node.replica)
        for member in node.membership.members:
            if member != node.replica:
                node.progress[member] = Progress(member, node.log.last_index + 1, node.now_ms)
        self.recount()
        node.reads.reign_begins()
        node.transfer.reign_begins()
        node.snapshots.reign_begins()
        node.replication.reign_begins()

    # ---- voting

    def is_sticky(self) -> bool:
        """A leader was heard within the shortest election timeout: it is not to be disturbed."""
        node = self.node
        if not (node.config.check_quorum or node.config.pre_vote):
            return False
        if node.role == LEADER or node.now_ms < self.sticky_until_ms:
            return True
        return node.leader is not None and node.now_ms - self.contact_ms < node.config.election_timeout_ms_min

    def on_request(self, message: RequestVote) -> None:
        """A request of this term or, for a pre-vote, of any; a higher term has been adopted before."""
        node = self.node
        up_to_date = node.log.is_up_to_date(message.last_index, message.last_term)
        if message.pre:
            if self.is_sticky():
                return
            free = message.term > node.term or (
                message.term == node.term and node.leader is None and node.vote in (None, message.source)
            )
            if free and up_to_date:
                # Echoes the request's term, which is not ours: nothing has to be on disk for it.
                node.send(message.source, VoteReply(message.term, node.replica, True, True))
            else:
                node.send(message.source, VoteReply(node.term, node.replica, False, True))
            return
        granted = up_to_date and node.vote in (None, message.source)
        if granted:
            if node.vote is None:
                node.set_hard_state(node.term, message.source)
            self.restart_timer()
        node.send(message.source, VoteReply(node.term, node.replica, granted, False))

    def refuse_old(self, message: RequestVote) -> None:
        """An answer, not silence: so a candidate left behind learns the term (thesis §4.2.3)."""
        reply = VoteReply(self.node.term, self.node.replica, False, message.pre)
        self.node.out.append(Send(message.source, reply, self.node.after()))

    def adopts_term_of(self, message: Message) -> bool:
        """Whether a message of a higher term moves this replica to that term (Figure 2, all servers)."""
        if isinstance(message, RequestVote):
            return not message.pre and (message.transfer or not self.is_sticky())
        if isinstance(message, VoteReply):
            return not (message.pre and message.granted)
        return True

    def timeout_now(self) -> None:
        """Leadership transfer: no pre-vote, and the vote overrides stickiness (thesis §3.10)."""
        if self.may_campaign() and self.node.role in (FOLLOWER, PRECANDIDATE, CANDIDATE):
            self.campaign(pre=False, transfer=True)
