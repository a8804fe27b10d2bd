//! What stands for the ring in a build without io_uring: nothing can be made of it, so nothing can be asked of it.

use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

use super::bell::EventFd;
use crate::storage::{IoDst, IoSrc};

/// There is none.
pub enum Ring {}

/// A file as the ring knows it.
pub type RingFile = RawFd;

impl Ring {
    /// Fails.
    pub fn new(_depth: u32) -> io::Result<Self> {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }

    /// Never called, like all that follows.
    pub fn add_file(&self, _fd: RawFd, _index: usize) -> RingFile {
        match *self {}
    }

    /// See [`Ring::add_file`].
    pub fn signal_at_completions(&self, _event: &EventFd) -> io::Result<()> {
        match *self {}
    }

    /// See [`Ring::add_file`].
    pub async fn read(&self, _file: RingFile, _pieces: &[IoDst<'_>], _offset: u64) -> io::Result<usize> {
        match *self {}
    }

    /// See [`Ring::add_file`].
    pub async fn write(&self, _file: RingFile, _pieces: &[IoSrc<'_>], _offset: u64) -> io::Result<usize> {
        match *self {}
    }

    /// See [`Ring::add_file`].
    pub async fn flush(&self, _file: RingFile) -> io::Result<usize> {
        match *self {}
    }

    /// See [`Ring::add_file`].
    pub async fn punch_hole(&self, _file: RingFile, _offset: u64, _length: u64) -> io::Result<usize> {
        match *self {}
    }

    /// See [`Ring::add_file`].
    pub fn submit(&self) {
        match *self {}
    }

    /// See [`Ring::add_file`].
    pub fn collect(&self) {
        match *self {}
    }

    /// See [`Ring::add_file`].
    pub fn sleep(&self, _alarm: &EventFd, _deadline: Option<Instant>) {
        match *self {}
    }
}
