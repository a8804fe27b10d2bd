//! What other qcow2 libraries need for the workloads of `benches/`: the same offsets in the same order, on an image that
//! the runner has made. One JSON line goes to stdout, with the keys that the C drivers print.
//!
//! What was written is read back through a new handle and compared, what was read is compared with a raw twin; neither
//! is part of the time that is measured.

mod imago_peer;
mod order;
mod qcow2_rs_peer;

use std::error::Error;
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, StreamExt};

use order::{Buffer, Order};

/// What any of them failed with.
pub type Failure = Box<dyn Error>;

/// An image, opened by one of the libraries.
pub trait Peer: Sized {
    /// Opens it for reading and writing.
    fn open(path: &Path, direct: bool) -> impl Future<Output = Result<Self, Failure>>;
    /// All of the buffer, at a guest offset.
    fn read(&self, buffer: &mut [u8], offset: u64) -> impl Future<Output = Result<(), Failure>>;
    /// All of the buffer, at a guest offset.
    fn write(&self, buffer: &[u8], offset: u64) -> impl Future<Output = Result<(), Failure>>;
    /// What was written is durable afterwards.
    fn flush(&self) -> impl Future<Output = Result<(), Failure>>;
}

/// The words of the command line.
pub struct Job {
    peer: String,
    call: String,
    image: PathBuf,
    /// What reads are compared with.
    twin: Option<PathBuf>,
    depth: u64,
    ops: u64,
    direct: bool,
    flush_each: bool,
    order: Order,
}

const USAGE: &str = "usage: peers imago|qcow2-rs read|write|open IMAGE [depth=N] [ops=N] [block=BYTES] [size=BYTES] \
                     [scatter=BYTES] [order=random|once|sequential] [direct=1] [flush_each=1] [twin=RAW]";

fn job() -> Option<Job> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [peer, call, image, settings @ ..] = &words[..] else { return None };
    let mut job = Job {
        peer: peer.clone(),
        call: call.clone(),
        image: image.into(),
        twin: None,
        depth: 1,
        ops: 1,
        direct: false,
        flush_each: false,
        order: Order::default(),
    };
    for setting in settings {
        let (key, value) = setting.split_once('=')?;
        let number = || value.parse::<u64>().ok();
        match key {
            "depth" => job.depth = number()?.max(1),
            "ops" => job.ops = number()?,
            "block" => job.order.block = number()?,
            "size" => job.order.size = number()?,
            "scatter" => job.order.scatter = number()?,
            "order" => job.order.kind = order::Kind::named(value)?,
            "direct" => job.direct = number()? != 0,
            "flush_each" => job.flush_each = number()? != 0,
            "twin" => job.twin = Some(value.into()),
            _ => return None,
        }
    }
    Some(job)
}

/// The processor time of this process.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec that may be written.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// One request after the other in each of `depth` tasks, which take turns.
async fn transfer<P: Peer>(peer: &P, job: &Job, buffers: &mut [Buffer]) -> Result<(), Failure> {
    let (depth, is_write) = (job.depth, job.call == "write");
    let task = |(first, buffer): (u64, Buffer)| async move {
        let mut buffer = buffer;
        for i in (first..job.ops).step_by(depth as usize) {
            let offset = job.order.offset_of(i);
            if is_write {
                buffer.stamp(offset);
                peer.write(buffer.bytes(), offset).await?;
                if job.flush_each {
                    peer.flush().await?;
                }
            } else {
                peer.read(buffer.bytes_mut(), offset).await?;
            }
        }
        Ok::<(), Failure>(())
    };
    let owned = (0..depth).zip(buffers.iter_mut().map(std::mem::take));
    let mut tasks: FuturesUnordered<_> = owned.map(task).collect();
    while let Some(result) = tasks.next().await {
        result?;
    }
    Ok(())
}

/// What was read or written is right.
async fn verify<P: Peer>(job: &Job) -> Result<(), Failure> {
    let peer = P::open(&job.image, job.direct).await?;
    let twin = job.twin.as_ref().map(std::fs::File::open).transpose()?;
    let (mut found, mut expected) = (Buffer::new(job.order.block), Buffer::new(job.order.block));
    for i in 0..job.ops.min(5000) {
        let offset = job.order.offset_of(i);
        peer.read(found.bytes_mut(), offset).await?;
        match &twin {
            Some(twin) => twin.read_exact_at(expected.bytes_mut(), offset)?,
            None => expected.stamp(offset),
        }
        if found.bytes() != expected.bytes() {
            return Err(format!("wrong data at {offset:#x}").into());
        }
    }
    Ok(())
}

/// Runs a job, and says how long it took.
pub async fn run<P: Peer>(job: &Job) -> Result<(), Failure> {
    let mut flushing = Duration::ZERO;
    let (began, cpu_began);
    if job.call == "open" {
        (began, cpu_began) = (Instant::now(), cpu_time());
        for _ in 0..job.ops {
            drop(P::open(&job.image, job.direct).await?);
        }
        report(job, began.elapsed(), cpu_time() - cpu_began, flushing);
        return Ok(());
    }
    let mut buffers: Vec<Buffer> = (0..job.depth).map(|_| Buffer::new(job.order.block)).collect();
    let peer = P::open(&job.image, job.direct).await?;
    (began, cpu_began) = (Instant::now(), cpu_time());
    transfer(&peer, job, &mut buffers).await?;
    let (elapsed, cpu) = (began.elapsed(), cpu_time() - cpu_began);
    if job.call == "write" {
        let began = Instant::now();
        peer.flush().await?;
        flushing = began.elapsed();
    }
    drop(peer);
    report(job, elapsed, cpu, flushing);
    verify::<P>(job).await
}

fn report(job: &Job, elapsed: Duration, cpu: Duration, flushing: Duration) {
    println!(
        "{{\"side\": \"{}\", \"round\": 0, \"ops\": {}, \"bytes\": {}, \"seconds\": {:.9}, \"cpu_seconds\": {:.9}, \
         \"flush_seconds\": {:.9}, \"heap_calls\": 0}}",
        job.peer,
        job.ops,
        job.ops * job.order.block,
        elapsed.as_secs_f64(),
        cpu.as_secs_f64(),
        flushing.as_secs_f64()
    );
}

fn main() {
    let Some(job) = job().filter(|job| ["read", "write", "open"].contains(&job.call.as_str())) else {
        eprintln!("{USAGE}");
        std::process::exit(2);
    };
    let result = match job.peer.as_str() {
        "imago" => imago_peer::run(&job),
        "qcow2-rs" => qcow2_rs_peer::run(&job),
        _ => Err(USAGE.into()),
    };
    if let Err(failure) = result {
        eprintln!("peers: {} on {}: {failure}", job.peer, job.image.display());
        std::process::exit(1);
    }
}
