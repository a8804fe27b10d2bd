//! Images to start from: made by QEMU, so that snapshots and compressed clusters are there before the engine can make them.

use std::rc::Rc;
use std::sync::Arc;

use qcow2::storage::sim::{DiskImage, Rng, SECTOR_BYTES, SimDisk};

use crate::judge::Layout;
use crate::qemu;

/// A kind of image.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    pub cluster_bits: u32,
    pub options: &'static str,
    pub backing: bool,
    pub snapshots: u32,
    pub compressed: bool,
    /// KiB written beforehand, so that the refcount structures are about to grow.
    pub prefill_kib: u64,
    pub data_file: Option<DataFile>,
}

/// An external data file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataFile {
    /// What the tables do not show is rubbish.
    Plain,
    /// It is a raw image by itself; made by QEMU, which allocates all of it.
    Raw,
    /// The same made by the library, which does not.
    RawByUs,
}

const PLAIN: Case = Case {
    name: "",
    cluster_bits: 16,
    options: "",
    backing: false,
    snapshots: 0,
    compressed: false,
    prefill_kib: 0,
    data_file: None,
};

/// The kinds of images with an external data file.
pub fn data_file_cases() -> Vec<Case> {
    let case = |name, cluster_bits, options, file| Case { name, cluster_bits, options, data_file: Some(file), ..PLAIN };
    vec![
        case("512 B, data file", 9, "", DataFile::Plain),
        Case { backing: true, ..case("4 KiB, data file, backing", 12, "", DataFile::Plain) },
        Case { backing: true, ..case("16 KiB, extended, data file, backing", 14, "extended_l2=on", DataFile::Plain) },
        case("64 KiB, extended, data file", 16, "extended_l2=on", DataFile::Plain),
        case("512 B, raw data file", 9, "", DataFile::RawByUs),
        case("4 KiB, raw data file by QEMU", 12, "", DataFile::Raw),
        case("16 KiB, extended, raw data file by QEMU", 14, "extended_l2=on", DataFile::Raw),
        case("16 KiB, extended, raw data file", 14, "extended_l2=on", DataFile::RawByUs),
    ]
}

/// The kinds of images that the simulated tests run over.
pub fn cases() -> Vec<Case> {
    let case = |name, cluster_bits, options| Case { name, cluster_bits, options, ..PLAIN };
    vec![
        case("512 B", 9, ""),
        case("512 B, 1-bit refcounts", 9, "refcount_bits=1"),
        case("512 B, 64-bit refcounts", 9, "refcount_bits=64"),
        Case { prefill_kib: 1980, ..case("512 B, 64-bit, table about to grow", 9, "refcount_bits=64") },
        Case { snapshots: 2, ..case("512 B, snapshots", 9, "") },
        Case { compressed: true, backing: true, ..case("512 B, compressed, backing", 9, "") },
        case("4 KiB", 12, ""),
        Case { backing: true, ..case("4 KiB, backing", 12, "") },
        Case { snapshots: 1, compressed: true, ..case("4 KiB, snapshot, compressed", 12, "") },
        Case { compressed: true, ..case("4 KiB, 2-bit refcounts, zstd", 12, "refcount_bits=2,compression_type=zstd") },
        Case { snapshots: 1, ..case("4 KiB, v2, snapshot", 12, "compat=0.10") },
        case("64 KiB", 16, ""),
        Case { compressed: true, ..case("64 KiB, compressed", 16, "") },
        case("16 KiB, extended", 14, "extended_l2=on"),
        case("64 KiB, extended", 16, "extended_l2=on"),
        Case { backing: true, ..case("16 KiB, extended, backing", 14, "extended_l2=on") },
        Case { snapshots: 1, ..case("16 KiB, extended, snapshot", 14, "extended_l2=on,refcount_bits=64") },
        Case { snapshots: 1, compressed: true, backing: true, ..case("64 KiB, extended, all", 16, "extended_l2=on") },
    ]
}

/// An image to start from, and what is known about it.
#[derive(Clone)]
pub struct Start {
    pub image: DiskImage,
    /// The external data file; nothing where there is none.
    pub data: DiskImage,
    pub data_file: Option<DataFile>,
    pub backing: Option<Arc<SimDisk>>,
    backing_image: DiskImage,
    pub cluster: u64,
    pub guest_size: u64,
    /// Guest clusters that scripts write to, and their sectors.
    pub hot: Vec<u64>,
    pub hot_sectors: Vec<u64>,
    /// Contents of the hot sectors in each snapshot.
    pub snapshots: Vec<Vec<Rc<[u8; SECTOR_BYTES]>>>,
    pub extended: bool,
    is_v2: bool,
}

impl Case {
    /// Makes the image.
    pub fn make(&self, dir: &qemu::Dir) -> Start {
        let cluster = 1u64 << self.cluster_bits;
        let extended = self.options.contains("extended_l2=on");
        let per_table = cluster / if extended { 16 } else { 8 };
        // Clusters beside each other, two at the start of the second L2 table, and the last one, half outside.
        let prefilled = (self.prefill_kib * 1024).div_ceil(cluster);
        let far = prefilled.next_multiple_of(per_table) + per_table;
        let guest_size = (far + 3) * cluster - if cluster > 512 { cluster / 2 } else { 0 };
        let hot = vec![prefilled, prefilled + 1, prefilled + 2, prefilled + 3, far, far + 1, far + 2];
        let (path, base) = (dir.path("start.qcow2"), dir.path("base.raw"));
        let mut backing = DiskImage::empty();
        let size = guest_size.to_string();
        let options =
            format!("cluster_size={cluster}{}{}", if self.options.is_empty() { "" } else { "," }, self.options);
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if self.backing {
            // Shorter than the image: it ends inside of the hot cluster far + 1.
            backing = around(&hot, cluster, (far + 1) * cluster + cluster.min(1024) / 2, 7);
            write_sparse(&base, &backing);
            args.extend(["-b", &base, "-F", "raw"]);
        }
        args.extend([&path[..], &size]);
        let data_path = dir.path("start.data");
        if self.data_file.is_some() {
            let _ = std::fs::remove_file(&path);
            let _ = std::fs::remove_file(&data_path);
            self.make_with_data_file(&path, &data_path, guest_size, &base);
        } else {
            qemu::img(&args);
        }
        self.populate(&path, &hot, cluster, prefilled);
        let image = DiskImage::new(std::fs::read(&path).unwrap());
        let data = if self.data_file.is_some() { std::fs::read(&data_path).unwrap() } else { Vec::new() };
        let hot_sectors: Vec<u64> =
            hot.iter().flat_map(|c| c * cluster / 512..((c + 1) * cluster).min(guest_size) / 512).collect();
        let mut start = Start {
            image: DiskImage::default(),
            data: DiskImage::new(data),
            data_file: self.data_file,
            backing: self.backing.then(|| Arc::new(SimDisk::new(backing.clone()))),
            backing_image: backing,
            cluster,
            guest_size,
            hot,
            hot_sectors,
            snapshots: Vec::new(),
            extended,
            is_v2: self.options.contains("compat=0.10"),
        };
        start.snapshots = (1..=self.snapshots as usize).map(|tree| start.contents(&image, tree)).collect();
        start.image = image;
        if self.data_file == Some(DataFile::Plain) {
            start.fill_with_rubbish();
        }
        start
    }

    fn make_with_data_file(&self, path: &str, data_path: &str, size: u64, base: &str) {
        let raw = if self.data_file == Some(DataFile::Plain) { "off" } else { "on" };
        let cluster_size = (1u64 << self.cluster_bits).to_string();
        let mut settings = vec![("cluster_size", &cluster_size[..]), ("data_file", data_path), ("data_file_raw", raw)];
        settings.extend(self.options.split(',').filter_map(|setting| setting.split_once('=')));
        if self.backing {
            settings.extend([("backing_file", base), ("backing_fmt", "raw")]);
        }
        if self.data_file == Some(DataFile::RawByUs) {
            let mut options = qcow2::CreateOptions::default();
            settings.iter().for_each(|(key, value)| options.set(key, value).unwrap());
            return qcow2::image::create(std::path::Path::new(path), size, &options, false).unwrap();
        }
        let settings: Vec<String> = settings.iter().map(|(key, value)| format!("{key}={value}")).collect();
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", &settings.join(","), path, &size.to_string()]);
    }

    /// Old contents: data in some hot clusters, snapshots between them, compressed clusters.
    fn populate(&self, path: &str, hot: &[u64], cluster: u64, prefilled: u64) {
        if prefilled > 0 {
            qemu::io(path, &[&format!("write -q -P 9 0 {}", prefilled * cluster)]);
        }
        let write =
            |flags: &str, pattern: u32, at: u64, length: u64| format!("write -q {flags} -P {pattern} {at} {length}");
        if self.compressed {
            let commands = [hot[1], hot[2], hot[4]].map(|c| write("-c", 20 + (c % 7) as u32, c * cluster, cluster));
            qemu::io(path, &commands.each_ref().map(|c| &c[..]));
        }
        if self.data_file.is_some() {
            let part = write("", 50, hot[3] * cluster + cluster / 2, cluster / 4 + 128);
            let commands = [
                write("", 40, hot[0] * cluster, cluster),
                part,
                write("", 60, hot[5] * cluster, cluster),
                write("", 61, hot[1] * cluster, 2 * cluster),
            ];
            qemu::io(path, &commands.each_ref().map(|c| &c[..]));
            // QEMU leaves the older bytes where they are, unless the file has to be raw.
            qemu::io(
                path,
                &[
                    &format!("write -q -z {} {cluster}", hot[1] * cluster),
                    &format!("discard -q {} {cluster}", hot[2] * cluster),
                ],
            );
        }
        for snapshot in 0..self.snapshots {
            let first = write("", 40 + snapshot, hot[0] * cluster, cluster);
            let part = write("", 50 + snapshot, hot[3] * cluster + cluster / 2, cluster / 4 + 128);
            let next = write("", 60 + snapshot, hot[5] * cluster, cluster);
            qemu::io(path, &[&first[..], &part, &next]);
            qemu::img(&["snapshot", "-c", &format!("s{snapshot}"), path]);
        }
    }
}

/// The clusters and those on both sides of each.
fn with_neighbours(hot: &[u64]) -> std::collections::BTreeSet<u64> {
    hot.iter().flat_map(|&cluster| cluster.saturating_sub(1)..cluster + 2).collect()
}

/// A file of `size` bytes with something in each sector of the hot clusters and their neighbours, by which it is known.
fn around(hot: &[u64], cluster: u64, size: u64, op: u64) -> DiskImage {
    let mut file = DiskImage::empty();
    for index in with_neighbours(hot) {
        let (from, to) = (index * cluster, ((index + 1) * cluster).min(size));
        if from < to {
            file.put(from, &super::pattern(op, from, to - from));
        }
    }
    file.size = size;
    file
}

/// Writes a file that has holes where the image has.
pub fn write_sparse(path: &str, image: &DiskImage) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(image.size).unwrap();
    let mut at = 0;
    while at < image.size {
        let (is_hole, next) = image.hole(at);
        if !is_hole {
            let part = image.part(at, (image.size - at) as usize);
            std::os::unix::fs::FileExt::write_all_at(&file, part, at).unwrap();
        }
        at = next;
    }
}

impl Start {
    fn contents(&self, image: &DiskImage, tree: usize) -> Vec<Rc<[u8; SECTOR_BYTES]>> {
        let layout = Layout::parse_files([image, &self.data]).unwrap();
        let mut last: Rc<[u8; SECTOR_BYTES]> = Rc::new([0; SECTOR_BYTES]);
        let mut contents = Vec::new();
        for &sector in &self.hot_sectors {
            let mut found = [0; SECTOR_BYTES];
            if layout.read(tree, sector, &mut found).unwrap().is_none() {
                found = self.backing_sector(sector);
            }
            if found != *last {
                last = Rc::new(found);
            }
            contents.push(last.clone());
        }
        contents
    }

    /// Puts foreign bytes wherever the tables do not show the data file, in and beside the clusters that are used.
    fn fill_with_rubbish(&mut self) {
        let layout = Layout::parse_files([&self.image, &self.image]).unwrap();
        let rubbish = around(&self.hot, self.cluster, self.guest_size.next_multiple_of(SECTOR_BYTES as u64), 0xbad);
        let mut bytes = [0; SECTOR_BYTES];
        for cluster in with_neighbours(&self.hot) {
            for sector in cluster * self.cluster / 512..((cluster + 1) * self.cluster).min(rubbish.size) / 512 {
                if !matches!(layout.place(0, sector), crate::judge::layout::Place::External(_)) {
                    rubbish.read(sector * SECTOR_BYTES as u64, &mut bytes);
                    self.data.put(sector * SECTOR_BYTES as u64, &bytes);
                }
            }
        }
        self.data.size = self.data.size.max(rubbish.size);
    }

    /// Whether the data file is a raw image by itself.
    pub fn is_raw(&self) -> bool {
        matches!(self.data_file, Some(DataFile::Raw | DataFile::RawByUs))
    }

    /// Whether the image is of version 3: it may have bitmaps, and snapshots that know their size.
    pub fn is_v3(&self) -> bool {
        !self.is_v2
    }

    /// The guest before the first operation.
    pub fn guest(&self) -> super::Guest {
        let contents = self.contents(&self.image, 0);
        super::Guest::new(self.hot_sectors.iter().copied().zip(contents))
    }

    /// A sector of the backing file; zeroes past its end or without one.
    pub fn backing_sector(&self, sector: u64) -> [u8; SECTOR_BYTES] {
        let mut found = [0; SECTOR_BYTES];
        self.backing_image.read(sector * SECTOR_BYTES as u64, &mut found);
        found
    }

    /// A hot cluster as a range: what a discard gives up as a whole.
    pub fn random_cluster(&self, rng: &mut Rng) -> (u64, u64) {
        let cluster = self.hot[rng.below(self.hot.len() as u64) as usize];
        (cluster * self.cluster, self.cluster.min(self.guest_size - cluster * self.cluster))
    }

    /// All that the last L2 table maps, which is three hot clusters: what drops the table.
    pub fn last_table(&self) -> (u64, u64) {
        let first = self.hot[self.hot.len() - 3] * self.cluster;
        (first, self.guest_size - first)
    }

    /// One to three hot clusters beside each other: what a compressed write takes.
    pub fn random_clusters(&self, rng: &mut Rng) -> (u64, u64) {
        let first = self.hot[rng.below(self.hot.len() as u64) as usize];
        let end = (first..first + 1 + rng.below(3)).take_while(|c| self.hot.contains(c)).last().unwrap() + 1;
        (first * self.cluster, (end * self.cluster).min(self.guest_size) - first * self.cluster)
    }

    /// Data for a compressed write: mostly compressible, sometimes not, sometimes zeroes.
    pub fn data_to_compress(&self, rng: &mut Rng, op: u64, offset: u64, length: u64) -> Vec<u8> {
        match rng.below(8) {
            0 => super::pattern(op, offset, length),
            1 => vec![0; length as usize],
            2 => {
                // Clusters take turns.
                let mut data = super::squeezable(op, offset, length);
                for (index, cluster) in (0u64..).zip(data.chunks_mut(self.cluster as usize)) {
                    let at = offset + index * self.cluster;
                    if (at / self.cluster).is_multiple_of(2) {
                        cluster.copy_from_slice(&super::pattern(op, at, cluster.len() as u64));
                    }
                }
                data
            }
            _ => super::squeezable(op, offset, length),
        }
    }

    /// An end for the disk: in or behind a hot cluster, or so far out that the L1 table has to move.
    pub fn random_end(&self, rng: &mut Rng) -> u64 {
        let cluster = self.hot[rng.below(self.hot.len() as u64) as usize];
        let per_table = self.cluster / if self.extended { 16 } else { 8 };
        let table_covers = per_table * self.cluster;
        let end = match rng.below(8) {
            0 => self.guest_size,
            1 => self.guest_size + rng.below(4 * self.cluster),
            2 => table_covers * (1 + rng.below(3)),
            // The L1 table of a larger cluster is too large to be filled here.
            3 if self.cluster == 512 => table_covers * (64 + rng.below(80)),
            _ => cluster * self.cluster + rng.below(self.cluster / 512 + 1) * 512,
        };
        end.next_multiple_of(512)
    }

    /// A range to write to: head, middle, tail or all of a subcluster or cluster, two clusters, or a few bytes;
    /// it starts and ends at multiples of `align`.
    pub fn random_range(&self, rng: &mut Rng, align: u64) -> (u64, u64) {
        let cluster = self.hot[rng.below(self.hot.len() as u64) as usize];
        let unit = if self.extended { self.cluster / 32 } else { self.cluster };
        let base = cluster * self.cluster + rng.below(self.cluster / unit) * unit;
        let (from, to) = match rng.below(7) {
            0 => (0, unit / 2),
            1 => (unit / 2, unit),
            2 => (unit / 4, unit / 4 + unit / 2),
            3 => (0, unit),
            4 => (0, unit * (1 + rng.below(4))),
            5 => (unit / 2, unit + unit / 2),
            _ => {
                let from = rng.below(unit);
                (from, from + 1 + rng.below(unit))
            }
        };
        let (mut from, mut to) = (base + from, base + to);
        if rng.one_in(10) {
            (from, to) = (cluster * self.cluster, (cluster + 2) * self.cluster);
        }
        // Stay inside the hot clusters: what follows them is not watched.
        let end = (cluster..).find(|c| !self.hot.contains(c)).unwrap() * self.cluster;
        let to = to.min(end).min(self.guest_size);
        let from = from.min(to - 1) / align * align;
        let to = to.next_multiple_of(align).min(self.guest_size);
        (from, to - from)
    }
}
