//! Numbers off the front of an input. At its end all of them are 0.

/// What is left of an input.
pub struct Bytes<'a> {
    left: &'a [u8],
}

impl<'a> Bytes<'a> {
    pub fn new(input: &'a [u8]) -> Self {
        Self { left: input }
    }

    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// Up to `n` bytes.
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, left) = self.left.split_at(n.min(self.left.len()));
        self.left = left;
        taken
    }

    pub fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }

    fn number(&mut self, bytes: usize) -> u64 {
        self.take(bytes).iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    pub fn u8(&mut self) -> u8 {
        self.number(1) as u8
    }

    pub fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }

    pub fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }

    pub fn u64(&mut self) -> u64 {
        self.number(8)
    }

    /// Below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.u16() as usize % limit
    }

    /// A position or length on a disk of `size` bytes: mostly inside it and often at the edge of something, sometimes
    /// anything.
    pub fn place(&mut self, size: u64, unit: u64) -> u64 {
        let (how, number) = (self.u8(), u64::from(self.u16()));
        let units = (size / unit).max(1);
        match how % 8 {
            0..=2 => number % units * unit,
            3 => (number % units * unit).wrapping_add(number >> 8).wrapping_sub(7),
            4 => (number * 512) % size.max(1),
            5 => size.saturating_sub(number % unit),
            6 => number,
            _ => self.u64(),
        }
    }
}
