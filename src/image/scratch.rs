//! What compressing and decompressing needs for a moment, kept from one cluster to the next.

use std::sync::{Mutex, OnceLock};

use crate::codec::Codec;
use crate::wait::lock;

/// Bytes of a transfer that are worth keeping, at most: a longer buffer is the request's own.
const STORED_KEPT_BYTES: usize = 4 << 20;

/// States of the codecs, and room for one cluster, both as it is and as it is stored.
#[derive(Default)]
pub struct Scratch {
    /// The states.
    pub codec: Codec,
    /// Room for a cluster, at least as long as was asked for.
    pub cluster: Vec<u8>,
    packed: Vec<u8>,
}

impl Scratch {
    /// Its codec, room for a cluster of that size, and for what it becomes: less than it is.
    pub fn split(&mut self, cluster_bytes: usize) -> (&mut Codec, &mut [u8], &mut [u8]) {
        if self.packed.len() < cluster_bytes {
            self.packed = vec![0; cluster_bytes];
        }
        (&mut self.codec, &mut self.cluster[..cluster_bytes], &mut self.packed[..cluster_bytes - 1])
    }
}

/// As many as work at once, and no more than there are processors while nobody does: memory is bounded by these, and
/// not by the threads that ever came by.
#[derive(Default)]
pub struct Scratches {
    idle: Mutex<Vec<Scratch>>,
    stored: Mutex<Vec<Vec<u8>>>,
}

fn kept_max() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

impl Scratches {
    /// Lends one for the time of `work`, with room for a cluster of that size. What is in there is of somebody before.
    pub fn with<T>(&self, cluster_bytes: usize, work: impl FnOnce(&mut Scratch) -> T) -> T {
        let mut scratch = lock(&self.idle).pop().unwrap_or_default();
        if scratch.cluster.len() < cluster_bytes {
            scratch.cluster = vec![0; cluster_bytes];
        }
        let outcome = work(&mut scratch);
        let mut idle = lock(&self.idle);
        if idle.len() < kept_max() {
            idle.push(scratch);
        }
        outcome
    }

    /// A buffer for a transfer of that length. What is in there is of somebody before.
    pub fn take_stored(&self, length: usize) -> Stored<'_> {
        let mut bytes = lock(&self.stored).pop().unwrap_or_default();
        if bytes.len() < length {
            bytes = vec![0; length]; // not resized: what it held is of no use
        }
        Stored { of: self, bytes, length }
    }
}

/// A buffer that goes back when it is dropped.
pub struct Stored<'a> {
    of: &'a Scratches,
    bytes: Vec<u8>,
    length: usize,
}

impl Stored<'_> {
    /// As many bytes as were asked for.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// See [`Stored::bytes`].
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

impl Drop for Stored<'_> {
    fn drop(&mut self) {
        let mut kept = lock(&self.of.stored);
        if kept.len() < kept_max() && self.bytes.len() <= STORED_KEPT_BYTES {
            kept.push(std::mem::take(&mut self.bytes));
        }
    }
}
