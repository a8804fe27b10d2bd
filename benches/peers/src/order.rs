//! Where the requests go, as `driver.c` and `queue.c` have it, and what is written there.

/// The order of the requests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Anywhere.
    Random,
    /// Each `scatter` bytes once before any twice.
    Once,
    /// One behind the other.
    Sequential,
}

impl Kind {
    /// The kind that a word of the command line means.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "random" => Some(Self::Random),
            "once" => Some(Self::Once),
            "sequential" => Some(Self::Sequential),
            _ => None,
        }
    }
}

/// A series of requests. All sizes are powers of two.
pub struct Order {
    /// The order.
    pub kind: Kind,
    /// Bytes of a request.
    pub block: u64,
    /// Bytes of the disk.
    pub size: u64,
    /// See `Kind::Once`.
    pub scatter: u64,
}

impl Default for Order {
    fn default() -> Self {
        Self { kind: Kind::Random, block: 4096, size: 512 << 20, scatter: 128 << 10 }
    }
}

fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Order {
    /// Where request `i` goes.
    pub fn offset_of(&self, i: u64) -> u64 {
        let blocks = self.size / self.block;
        match self.kind {
            Kind::Random => (mix(i.wrapping_mul(0x9e37_79b9_7f4a_7c15)) & (blocks - 1)) * self.block,
            Kind::Sequential => (i & (blocks - 1)) * self.block,
            Kind::Once => {
                let pieces = self.size / self.scatter;
                let half = pieces.trailing_zeros() / 2;
                let piece = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) & (pieces - 1);
                let piece = (piece ^ (piece >> half)).wrapping_mul(0xbf58_476d_1ce4_e5b9) & (pieces - 1);
                let within = (mix(piece) + i / pieces) % (self.scatter / self.block);
                piece * self.scatter + within * self.block
            }
        }
    }
}

const ALIGNMENT: usize = 4096;

/// A buffer that O_DIRECT takes.
#[derive(Default)]
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// One of so many bytes, with something in it.
    pub fn new(length: u64) -> Self {
        let length = length as usize;
        let mut memory = vec![0; length + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        for (i, word) in memory[start..start + length].chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&mix((i * 8 % ALIGNMENT) as u64 + 1).to_le_bytes());
        }
        Self { memory, start, length }
    }

    /// What is in it.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    /// The same, to be written to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }

    /// Says in front of each 4 KiB where they belong.
    pub fn stamp(&mut self, offset: u64) {
        for (i, block) in self.bytes_mut().chunks_mut(ALIGNMENT).enumerate() {
            block[..8].copy_from_slice(&mix(offset + (i * ALIGNMENT) as u64 + 1).to_le_bytes());
        }
    }
}
