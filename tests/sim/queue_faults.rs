//! Faults under queues: several requests are under way when a call of the storage fails. Each request ends once, with
//! its own outcome: what was acknowledged is there, reads show what must be, the error that the fault caused is one of
//! theirs, and the others have no errors of another kind. The image and the handle are left as blocking calls leave them,
//! which is judged by the same function.
//!
//! `QUEUE_FAULT_SCRIPTS` sets the number of scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::faults::{Run, Step, check, script};
use crate::judge::Judge;
use crate::number;
use crate::qemu;
use crate::requests::{BACKENDS, Buffer, push, reap};
use crate::stage::{Start, Ticket, cases, content_of, data_file_cases, judge_durable, open_disks, pattern, squeezable};
use qcow2::Error;
use qcow2::error::{ErrorCode, IoOp};
use qcow2::format::GuestOffset;
use qcow2::image::{Image, WriteFlags, ZeroFlags};
use qcow2::queue::{Backend, Queue, Request};
use qcow2::storage::Blocking;
use qcow2::storage::sim::{Fault, Rng, SECTOR_BYTES};

const SCRIPTS_BY_DEFAULT: u64 = 52;
const DEPTH: usize = 6;

#[derive(Debug, Clone, Copy)]
enum Ask {
    Change(Step),
    Read { offset: u64, length: u64 },
}

impl Ask {
    fn range(self) -> std::ops::Range<u64> {
        let (offset, length) = match self {
            Self::Change(Step::Flush) => (0, 0),
            Self::Read { offset, length }
            | Self::Change(
                Step::Write { offset, length, .. }
                | Step::Compressed { offset, length, .. }
                | Step::Zero { offset, length, .. }
                | Step::Discard { offset, length },
            ) => (offset, length),
        };
        offset..offset + length
    }

    fn meets(self, other: Self) -> bool {
        let (a, b) = (self.range(), other.range());
        let both_read = matches!((self, other), (Self::Read { .. }, Self::Read { .. }));
        !both_read && a.start < b.end && b.start < a.end
    }
}

/// The script of blocking calls, with reads in between.
fn asks(start: &Start, seed: u64) -> Vec<Ask> {
    let mut rng = Rng::new(seed);
    let mut asks = Vec::new();
    for step in script(start, seed) {
        if rng.one_in(2) {
            let (offset, length) = start.random_range(&mut rng, SECTOR_BYTES as u64);
            asks.push(Ask::Read { offset, length });
        }
        asks.push(Ask::Change(step));
    }
    asks.push(Ask::Change(Step::Flush));
    asks
}

struct Sent {
    ask: Ask,
    buffer: Buffer,
    ticket: Option<Ticket>,
    began: u64,
    /// A failed flush had been reaped before it was pushed.
    too_late: bool,
}

/// A client of a queue. Its requests meet in clusters, and never in sectors. (The queue goes first: it waits for its
/// requests.)
struct Client<'a> {
    queue: Queue,
    sent: BTreeMap<u64, Sent>,
    pushed: u64,
    run: &'a mut Run,
    /// Sectors that a change failed over: any of their values is right.
    uncertain: BTreeSet<u64>,
    flush_failed: bool,
    wrong: Vec<String>,
}

impl<'a> Client<'a> {
    fn new(image: &Arc<Image>, backend: Backend, run: &'a mut Run) -> Self {
        let queue = Queue::new(image.clone(), DEPTH as u32, backend).unwrap();
        let (sent, uncertain) = (BTreeMap::new(), BTreeSet::new());
        Self { queue, sent, pushed: 0, run, uncertain, flush_failed: false, wrong: Vec::new() }
    }

    fn push(&mut self, ask: Ask) {
        while self.sent.len() == DEPTH || self.sent.values().any(|sent| sent.ask.meets(ask)) {
            self.reap(1);
        }
        self.pushed += 1;
        let (op, range) = (self.pushed, ask.range());
        let (at, length) = (GuestOffset(range.start), range.end - range.start);
        let mut buffer = match ask {
            Ask::Change(Step::Write { .. }) => Buffer::of(&pattern(op, range.start, length)),
            Ask::Change(Step::Compressed { .. }) => Buffer::of(&squeezable(op, range.start, length)),
            _ => Buffer::new(length as usize),
        };
        let request = match ask {
            Ask::Read { .. } => Request::Read(vec![buffer.dst(0, length as usize)], at),
            Ask::Change(Step::Write { fua, .. }) => {
                Request::Write(vec![buffer.src(0, length as usize)], at, WriteFlags { fua, compressed: false })
            }
            Ask::Change(Step::Compressed { fua, .. }) => {
                Request::Write(vec![buffer.src(0, length as usize)], at, WriteFlags { fua, compressed: true })
            }
            Ask::Change(Step::Zero { unmap, .. }) => {
                Request::WriteZeroes(at, length, ZeroFlags { may_unmap: unmap, ..ZeroFlags::default() })
            }
            Ask::Change(Step::Discard { .. }) => Request::Discard(at, length),
            Ask::Change(Step::Flush) => Request::Flush,
        };
        let began = self.run.guest.now();
        let ticket = match ask {
            Ask::Read { .. } | Ask::Change(Step::Flush) => None,
            Ask::Change(_) => Some(self.run.guest.issue(range.start, buffer.bytes())),
        };
        push(&mut self.queue, request, op);
        self.sent.insert(op, Sent { ask, buffer, ticket, began, too_late: self.flush_failed });
    }

    fn reap(&mut self, count: usize) {
        for (op, result) in reap(&mut self.queue, count) {
            let sent = self.sent.remove(&op).expect("a request that was sent, and reaped once");
            let sectors = sent.ask.range().start / SECTOR_BYTES as u64..sent.ask.range().end / SECTOR_BYTES as u64;
            if sent.too_late && matches!(sent.ask, Ask::Change(_)) {
                let code = result.as_ref().map_err(Error::code);
                if code != Err(ErrorCode::Poisoned) {
                    self.wrong.push(format!("{:?} after a failed flush: {code:?}", sent.ask));
                }
            }
            if let Err(why) = result {
                self.flush_failed |= matches!(why, Error::Io { op: IoOp::Flush, .. });
                if sent.ticket.is_some() {
                    self.uncertain.extend(sectors);
                }
                self.run.errors.push((format!("request {op}: {:?}", sent.ask), why));
                continue;
            }
            match (sent.ask, &sent.ticket) {
                (Ask::Change(Step::Write { fua: true, .. } | Step::Compressed { fua: true, .. }), Some(ticket)) => {
                    self.run.guest.forced(ticket);
                }
                (_, Some(ticket)) => self.run.guest.complete(ticket),
                (Ask::Change(_), None) => self.run.guest.flushed(sent.began),
                (Ask::Read { .. }, None) => self.look(op, sectors.start, sent.buffer.bytes()),
            }
            if sent.ticket.is_some() {
                self.uncertain.retain(|sector| !sectors.contains(sector));
            }
        }
    }

    /// What a read has found.
    fn look(&mut self, op: u64, first: u64, found: &[u8]) {
        for (sector, found) in (first..).zip(found.chunks(SECTOR_BYTES)) {
            let found: &[u8; SECTOR_BYTES] = found.try_into().unwrap();
            let latest = self.run.guest.latest(sector);
            if !self.uncertain.contains(&sector) && found != latest {
                let (is, was) = (content_of(found), content_of(latest));
                self.wrong.push(format!("read {op}: sector {sector} is {is}, and was left as {was}"));
            }
            self.wrong.extend(self.run.guest.judge(sector, found).err());
        }
    }
}

/// Runs a script over a queue. The calls of a fault are counted from the first after the image was opened.
fn run(start: &Start, asks: &[Ask], backend: Backend, faulty: usize, fault: Option<Fault>, label: &str) -> Run {
    let mut run = Run::new(start, faulty, true);
    let opened = qcow2::wait::block_on(open_disks(&Blocking, &run.disks, start, 2 * start.cluster.min(4096)));
    let image = Arc::new(opened.unwrap());
    run.opened = true;
    let before = run.disks[faulty].calls();
    run.disks[faulty].set_fault(fault.map(|fault| Fault { index: before + fault.index, ..fault }));
    let mut client = Client::new(&image, backend, &mut run);
    for (n, &ask) in asks.iter().enumerate() {
        client.push(ask);
        if n % 3 == 0 {
            client.queue.submit();
        }
    }
    client.reap(usize::MAX);
    assert!(client.sent.is_empty(), "{label}: every request ends");
    assert!(client.wrong.is_empty(), "{label}: {:#?}\nerrors: {:#?}", client.wrong, client.run.errors);
    drop(client);
    run.close(&image);
    run.calls = run.disks[faulty].calls() - before;
    run
}

#[test]
fn every_failing_call_ends_the_requests_of_a_queue_that_it_hits() {
    let Some(dir) = qemu::dir("queue-faults") else { return };
    let cases: Vec<_> = cases().into_iter().chain(data_file_cases()).collect();
    let scripts = number("QUEUE_FAULT_SCRIPTS", SCRIPTS_BY_DEFAULT).div_ceil(cases.len() as u64);
    let (mut outcomes, mut others): (BTreeMap<&str, u64>, u64) = (BTreeMap::new(), 0);
    for case in &cases {
        let start = case.make(&dir);
        for (seed, backend) in (1..=scripts).zip(BACKENDS.into_iter().cycle()) {
            let asks = asks(&start, seed);
            let label = format!("{}, seed {seed}, {backend:?}", case.name);
            let calls =
                |disk| (0..run(&start, &asks, backend, disk, None, &label).calls).map(move |index| (disk, index));
            for (disk, index) in [0, 1].map(calls).into_iter().flatten() {
                for (errno, sticky) in [(libc::EIO, false), (libc::ENOSPC, true)] {
                    let fault = Fault { index, errno, sticky };
                    let label = format!("{label}, {fault:?} of disk {disk}");
                    let run = run(&start, &asks, backend, disk, Some(fault), &label);
                    check(&start, &run, fault, &label);
                    for (what, error) in &run.errors {
                        let is_known = error.code() == ErrorCode::Poisoned || error.errno() == errno;
                        assert!(is_known, "{label}: {what}: {error}");
                    }
                    others += u64::from(run.errors.len() > 1);
                    let kind = run.disks[disk].fault_hit().map_or("not reached", |(what, _)| what);
                    *outcomes.entry(kind).or_default() += 1;
                }
            }
        }
    }
    println!("runs by the call that failed: {outcomes:?}; {others} with several errors");
    for kind in ["read", "write", "flush"] {
        assert!(outcomes.contains_key(kind), "no {kind} failed in any run");
    }
}

#[test]
fn a_queue_over_a_full_disk_that_is_emptied_again_takes_writes_again() {
    let Some(dir) = qemu::dir("queue-full") else { return };
    for case in cases() {
        let start = case.make(&dir);
        for backend in BACKENDS {
            let label = format!("{}, {backend:?}", case.name);
            let mut run = Run::new(&start, 0, true);
            let image = Arc::new(qcow2::wait::block_on(open_disks(&Blocking, &run.disks, &start, 0)).unwrap());
            let disk = run.disks[0].clone();
            let mut client = Client::new(&image, backend, &mut run);
            let round = |client: &mut Client<'_>| {
                for &cluster in &start.hot[..6] {
                    let (offset, length) = (cluster * start.cluster, start.cluster);
                    client.push(Ask::Change(Step::Write { offset, length: length.min(4096), fua: true }));
                    client.queue.submit();
                }
                client.push(Ask::Read { offset: start.hot[0] * start.cluster, length: 512 });
                client.reap(usize::MAX);
                assert!(client.sent.is_empty() && client.wrong.is_empty(), "{label}: {:#?}", client.wrong);
                std::mem::take(&mut client.run.errors)
            };
            disk.set_fault(Some(Fault { index: disk.calls(), errno: libc::ENOSPC, sticky: true }));
            let failed = round(&mut client);
            assert!(failed.len() >= 5 && failed.iter().all(|(_, e)| e.errno() == libc::ENOSPC), "{label}: {failed:?}");
            disk.set_fault(None);
            assert_eq!(round(&mut client).len(), 0, "{label}");
            drop(client);
            run.close(&image);
            let mut judge = Judge::default();
            assert!(run.closed, "{label}: {:?}", run.errors);
            assert_eq!(judge_durable(&mut judge, &run.disks, &run.guest, &start), Vec::<String>::new(), "{label}");
            assert_eq!(judge.judge(&disk.durable()).leaks, 0, "{label}: what was reserved was not given back");
        }
    }
}
