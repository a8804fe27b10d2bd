//! From bytes to structures and guest content, for the judge.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use qcow2::storage::sim::DiskImage;

/// An L1 table: the active one, or a snapshot's.
#[derive(Debug, Clone)]
pub struct Tree {
    pub l1_offset: u64,
    pub l1_entries: u64,
    pub guest_size: u64,
}

/// The words of an L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub descriptor: u64,
    pub bitmap: u64,
}

/// Where a guest sector comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A sector of the host file.
    Host(u64),
    /// A sector of the external data file.
    External(u64),
    Zero,
    /// Not allocated here: the backing file, or zeroes.
    Backing,
    /// Inside a compressed cluster: its descriptor, and the sector within.
    Compressed(u64, u64),
}

/// A parsed header and the bytes behind it. Tree 0 is the active one, then the snapshots.
pub struct Layout<'a> {
    pub image: &'a DiskImage,
    /// The external data file, if guest data is in one.
    pub data: Option<&'a DiskImage>,
    pub version: u32,
    pub cluster_bits: u32,
    pub extended: bool,
    pub dirty: bool,
    pub corrupt: bool,
    pub zstd: bool,
    pub has_backing: bool,
    pub refcount_order: u32,
    pub l1_offset: u64,
    pub l1_entries: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u64,
    pub snapshots_offset: u64,
    pub snapshots_bytes: u64,
    pub trees: Vec<Tree>,
}

fn word32(image: &DiskImage, at: usize) -> u32 {
    let mut word = [0; 4];
    image.read(at as u64, &mut word);
    u32::from_be_bytes(word)
}

impl<'a> Layout<'a> {
    /// Reads the header and the snapshot table.
    pub fn parse(image: &'a DiskImage) -> Result<Self, String> {
        static NOTHING: DiskImage = DiskImage::empty();
        Self::parse_files([image, &NOTHING])
    }

    /// As [`parse`](Self::parse), for an image that may have an external data file.
    pub fn parse_files([image, data]: [&'a DiskImage; 2]) -> Result<Self, String> {
        let long = |at: usize| u64::from(word32(image, at)) << 32 | u64::from(word32(image, at + 4));
        if image.size < 104 || word32(image, 0) != 0x5146_49fb {
            return Err(format!("no qcow2 header in a file of {} bytes", image.size));
        }
        let version = word32(image, 4);
        let v3 = version == 3;
        let incompatible = if v3 { long(72) } else { 0 };
        let mut layout = Self {
            image,
            data: (incompatible & 4 != 0).then_some(data),
            version,
            cluster_bits: word32(image, 20),
            extended: incompatible & 16 != 0,
            dirty: incompatible & 1 != 0,
            corrupt: incompatible & 2 != 0,
            zstd: incompatible & 8 != 0 && word32(image, 104) >> 24 == 1,
            has_backing: long(8) != 0,
            refcount_order: if v3 { word32(image, 96) } else { 4 },
            l1_offset: long(40),
            l1_entries: u64::from(word32(image, 36)),
            refcount_table_offset: long(48),
            refcount_table_clusters: u64::from(word32(image, 56)),
            snapshots_offset: long(64),
            snapshots_bytes: 0,
            trees: Vec::new(),
        };
        if !(2..=3).contains(&version) || !(9..=21).contains(&layout.cluster_bits) || layout.refcount_order > 6 {
            return Err("version, cluster_bits or refcount_order out of range".into());
        }
        if layout.corrupt {
            return Err("the corrupt bit is set".into());
        }
        let guest_size = long(24);
        layout.trees.push(Tree { l1_offset: layout.l1_offset, l1_entries: layout.l1_entries, guest_size });
        let needed = guest_size.div_ceil(layout.cluster() * layout.l2_entries());
        if layout.l1_entries < needed || layout.l1_entries > 1 << 22 {
            return Err(format!("L1 table has {} entries, {needed} are needed", layout.l1_entries));
        }
        layout.parse_snapshots(word32(image, 60))?;
        Ok(layout)
    }

    fn parse_snapshots(&mut self, count: u32) -> Result<(), String> {
        let mut at = self.snapshots_offset as usize;
        for _ in 0..count {
            if at as u64 + 40 > self.image.size {
                return Err("snapshot table reaches past the end of the file".into());
            }
            let word = |within: usize| word32(self.image, at + within);
            let extra = word(36) as usize;
            let guest_size = if extra >= 16 { self.u64((at + 48) as u64) } else { self.trees[0].guest_size };
            let l1_offset = self.u64(at as u64);
            self.trees.push(Tree { l1_offset, l1_entries: u64::from(word(8)), guest_size });
            at += (40 + extra + (word(12) >> 16) as usize + (word(12) & 0xffff) as usize).next_multiple_of(8);
        }
        self.snapshots_bytes = at as u64 - self.snapshots_offset;
        Ok(())
    }

    /// Cluster size in bytes.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub fn l2_entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    pub fn l2_entries(&self) -> u64 {
        self.cluster() / self.l2_entry_bytes()
    }

    /// A big-endian word of the file; zero past its end.
    pub fn u64(&self, at: u64) -> u64 {
        match self.image.part(at, 8).try_into() {
            Ok(bytes) => u64::from_be_bytes(bytes),
            // It lies across two pieces of the image, or past its end.
            Err(_) => {
                let mut bytes = [0; 8];
                self.image.read(at, &mut bytes);
                u64::from_be_bytes(bytes)
            }
        }
    }

    pub fn entry_at(&self, place: u64) -> Entry {
        Entry { descriptor: self.u64(place), bitmap: if self.extended { self.u64(place + 8) } else { 0 } }
    }

    /// What is wrong with an L2 entry (D6).
    pub fn malformed(&self, entry: Entry) -> Option<&'static str> {
        let Entry { descriptor, bitmap } = entry;
        let copied = descriptor >> 63 == 1;
        if descriptor >> 62 & 1 == 1 {
            return match () {
                () if copied => Some("compressed and COPIED"),
                () if bitmap != 0 => Some("compressed with a bitmap"),
                () => None,
            };
        }
        let (alloc, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        let host = descriptor & 0x00ff_ffff_ffff_fe00;
        match () {
            () if descriptor & 0x3f00_0000_0000_01fe != 0 => Some("reserved bits"),
            () if descriptor & 1 == 1 && (self.extended || self.version == 2) => Some("zero flag where there is none"),
            () if host == 0 && copied && self.data.is_none() => Some("COPIED without a host cluster"),
            () if alloc & zero != 0 => Some("a subcluster is allocated and zero"),
            () if alloc != 0 && host == 0 && !copied => Some("an allocated subcluster without a host cluster"),
            () => None,
        }
    }

    /// Offset and length of what a compressed descriptor may occupy.
    pub fn compressed_extent(&self, descriptor: u64) -> (u64, u64) {
        let x = 62 - (self.cluster_bits - 8);
        let offset = descriptor & ((1 << x) - 1);
        let sectors = (descriptor & ((1 << 62) - 1)) >> x;
        (offset, (offset & !511) + (sectors + 1) * 512 - offset)
    }

    /// Refcount number `index` of a block.
    pub fn refcount(&self, block: u64, index: u64) -> u64 {
        let bits = 1u64 << self.refcount_order;
        let first_bit = index * bits;
        let byte = |i: u64| u64::from(self.image.part(block + i, 1).first().copied().unwrap_or(0));
        if bits < 8 {
            return byte(first_bit / 8) >> (first_bit % 8) & ((1 << bits) - 1);
        }
        (0..bits / 8).fold(0, |value, i| value << 8 | byte(first_bit / 8 + i))
    }

    /// Calls `each(index, refcount)` for each refcount of a block that is not 0.
    pub fn counted(&self, block: u64, each: &mut dyn FnMut(u64, u64)) {
        let (per_word, bits) = (64 >> self.refcount_order, 1u64 << self.refcount_order);
        self.words(block, self.cluster() / 8, &mut |index, word| {
            for within in 0..per_word {
                // Entries of a byte or more are big-endian; smaller ones fill their byte from its low bits on.
                let shift =
                    if bits >= 8 { 64 - bits * (within + 1) } else { 56 - within * bits / 8 * 8 + within * bits % 8 };
                let count = word >> shift & (u64::MAX >> (64 - bits));
                if count != 0 {
                    each(index * per_word + within, count);
                }
            }
        });
    }

    /// Calls `each(index, word)` for each of `count` words from `at` on that is not 0.
    pub fn words(&self, at: u64, count: u64, each: &mut dyn FnMut(u64, u64)) {
        let mut index = 0;
        while index < count {
            let (is_hole, next) = self.image.hole(at + index * 8);
            let here = ((next - at) / 8).min(count);
            if !is_hole {
                let part = self.image.part(at + index * 8, ((here - index) * 8) as usize);
                for (n, bytes) in (index..).zip(part.chunks_exact(8)).filter(|(_, bytes)| **bytes != [0; 8]) {
                    each(n, u64::from_be_bytes(bytes.try_into().unwrap()));
                }
            }
            index = here;
        }
    }

    /// The L2 entry of a guest cluster in a tree.
    pub fn entry(&self, tree: usize, guest_cluster: u64) -> Entry {
        let tree = &self.trees[tree];
        let l1_index = guest_cluster / self.l2_entries();
        let none = Entry { descriptor: 0, bitmap: 0 };
        if l1_index >= tree.l1_entries {
            return none;
        }
        match self.u64(tree.l1_offset + l1_index * 8) & 0x00ff_ffff_ffff_fe00 {
            0 => none,
            table => self.entry_at(table + guest_cluster % self.l2_entries() * self.l2_entry_bytes()),
        }
    }

    /// Where a guest sector comes from.
    pub fn place(&self, tree: usize, sector: u64) -> Place {
        let per_cluster = self.cluster() / 512;
        let Entry { descriptor, bitmap } = self.entry(tree, sector / per_cluster);
        let within = sector % per_cluster;
        if descriptor >> 62 & 1 == 1 {
            return Place::Compressed(descriptor, within);
        }
        let host = Place::Host((descriptor & 0x00ff_ffff_ffff_fe00) / 512 + within);
        if self.extended {
            let subcluster = within * 32 / per_cluster;
            return match (bitmap >> subcluster & 1, bitmap >> (32 + subcluster) & 1) {
                (1, _) if self.data.is_some() => Place::External(sector),
                (0, 0) => Place::Backing,
                (1, _) => host,
                _ => Place::Zero,
            };
        }
        match descriptor & 0x00ff_ffff_ffff_fe01 {
            0 if self.data.is_some() && descriptor >> 63 == 1 => Place::External(sector),
            0 => Place::Backing,
            word if word & 1 == 1 => Place::Zero,
            _ if self.data.is_some() => Place::External(sector),
            _ => host,
        }
    }

    /// What the guest reads in a sector; `None` where that is the backing file's.
    pub fn read(&self, tree: usize, sector: u64, out: &mut [u8; 512]) -> Result<Option<()>, String> {
        out.fill(0);
        match self.place(tree, sector) {
            Place::Zero => {}
            Place::Backing => return Ok(None),
            Place::Host(sector) => self.image.read(sector * 512, out),
            Place::External(sector) => self.data.iter().for_each(|data| data.read(sector * 512, out)),
            Place::Compressed(descriptor, within) => {
                let data = self.inflate(descriptor).ok_or_else(|| {
                    format!("guest sector {sector}: compressed cluster 0x{descriptor:x} does not decompress")
                })?;
                out.copy_from_slice(&data[within as usize * 512..][..512]);
            }
        }
        Ok(Some(()))
    }

    fn inflate(&self, descriptor: u64) -> Option<Rc<Vec<u8>>> {
        let (offset, length) = self.compressed_extent(descriptor);
        let mut packed = vec![0; length.min(self.image.end().saturating_sub(offset)) as usize];
        self.image.read(offset, &mut packed);
        INFLATED.with_borrow_mut(|known| {
            let key = (descriptor, self.cluster_bits, self.zstd);
            if known.len() > 500 {
                known.clear();
            }
            match known.get(&key) {
                Some((bytes, data)) if *bytes == packed => data.clone(),
                _ => {
                    let data = self.inflate_now(&packed).map(Rc::new);
                    known.insert(key, (packed, data.clone()));
                    data
                }
            }
        })
    }

    fn inflate_now(&self, packed: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; self.cluster() as usize];
        if self.zstd {
            let done = zstd_safe::DCtx::create().decompress_stream_whole(&mut out, packed);
            return (done == Some(out.len())).then_some(out);
        }
        let config = zlib_rs::InflateConfig { window_bits: -12 };
        let (data, _) = zlib_rs::decompress_slice(&mut out, packed, config);
        (data.len() == self.cluster() as usize).then_some(out)
    }
}

/// By descriptor, cluster size and method: the bytes there, and what they become.
type Inflated = HashMap<(u64, u32, bool), (Vec<u8>, Option<Rc<Vec<u8>>>)>;

thread_local! {
    /// What was decompressed last. Crash states of one moment have most of it in common, which is told by the bytes.
    static INFLATED: RefCell<Inflated> = RefCell::default();
}

trait DecompressWhole {
    /// Decompresses one frame, with whatever follows it ignored; returns the length.
    fn decompress_stream_whole(&mut self, out: &mut [u8], input: &[u8]) -> Option<usize>;
}

impl DecompressWhole for zstd_safe::DCtx<'_> {
    fn decompress_stream_whole(&mut self, out: &mut [u8], input: &[u8]) -> Option<usize> {
        let mut source = zstd_safe::InBuffer::around(input);
        let mut target = zstd_safe::OutBuffer::around(out);
        loop {
            let before = (source.pos, target.pos());
            let left = self.decompress_stream(&mut target, &mut source).ok()?;
            if left == 0 || before == (source.pos, target.pos()) {
                return Some(target.pos());
            }
        }
    }
}
