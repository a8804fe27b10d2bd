//! What tests of queues share: memory that requests use, and how they are handed in and taken out.
#![allow(dead_code)] // each test file uses its own part

use std::io::Write;
use std::sync::mpsc;
use std::time::Duration;

use qcow2::Result;
use qcow2::queue::{Backend, Queue, Request};
use qcow2::storage::{IoDst, IoSrc};

pub const BACKENDS: [Backend; 2] = [Backend::IoUring, Backend::Threads];
/// Memory that starts here goes to a file without the page cache as it is.
const ALIGNMENT: usize = 4096;

/// Memory that requests use, which stays where it is; looked at only while no request is using it.
pub struct Buffer {
    memory: Box<[u8]>,
    start: usize,
    length: usize,
}

impl Buffer {
    pub fn new(length: usize) -> Self {
        let memory: Box<[u8]> = vec![0; length + ALIGNMENT].into();
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start, length }
    }

    pub fn of(content: &[u8]) -> Self {
        let mut buffer = Self::new(content.len());
        buffer.bytes_mut().copy_from_slice(content);
        buffer
    }

    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }

    pub fn dst(&mut self, from: usize, length: usize) -> IoDst<'static> {
        assert!(from + length <= self.length);
        // SAFETY: the tests drop their queues, which wait for all requests, before their buffers.
        unsafe { IoDst::from_raw(self.bytes_mut().as_mut_ptr().add(from), length) }
    }

    pub fn src(&self, from: usize, length: usize) -> IoSrc<'static> {
        assert!(from + length <= self.length);
        // SAFETY: as above.
        unsafe { IoSrc::from_raw(self.bytes().as_ptr().add(from).cast_mut(), length) }
    }
}

pub fn push(queue: &mut Queue, request: Request, user_data: u64) {
    assert!(queue.push(request, user_data).is_ok(), "no slot is free");
}

/// So many that have ended, or all that are under way if these are fewer.
pub fn reap(queue: &mut Queue, count: usize) -> Vec<(u64, Result<()>)> {
    let mut all = Vec::new();
    queue.reap(count, count, None, |c| all.push((c.user_data, c.result))).unwrap();
    all
}

pub fn reap_all(queue: &mut Queue) -> Vec<(u64, Result<()>)> {
    reap(queue, usize::MAX)
}

/// What `call` returns, or the end of it all after so long: a thread that waits for ever cannot be ended by itself.
pub fn ends<T: Send>(what: &str, call: impl FnOnce() -> T + Send) -> T {
    const PATIENCE: Duration = Duration::from_secs(60);
    let (tell, told) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let _tells = tell; // by being dropped, also by a panic
            call()
        });
        if told.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = writeln!(std::io::stderr(), "FAILED: {what}: still waiting"); // not kept until the test ends
            std::process::abort();
        }
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
