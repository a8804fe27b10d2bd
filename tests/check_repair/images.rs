//! Images of all kinds, and what can be wrong with one.
#![allow(dead_code)] // each test file uses its own part

use crate::qemu;

/// How to make an image.
#[derive(Clone)]
pub struct Recipe {
    pub name: &'static str,
    pub options: &'static str,
    pub cluster: u64,
    pub compressed: bool,
    pub snapshots: u32,
    pub bitmaps: bool,
}

const PLAIN: Recipe = Recipe { name: "", options: "", cluster: 65536, compressed: false, snapshots: 0, bitmaps: false };

pub fn recipes() -> Vec<Recipe> {
    let recipe = |name, options, cluster| Recipe { name, options, cluster, ..PLAIN };
    vec![
        recipe("64 KiB", "cluster_size=64k", 65536),
        recipe("512 B", "cluster_size=512", 512),
        recipe("512 B, 64-bit", "cluster_size=512,refcount_bits=64", 512),
        recipe("4 KiB, 1-bit", "cluster_size=4k,refcount_bits=1", 4096),
        recipe("4 KiB, 2-bit", "cluster_size=4k,refcount_bits=2", 4096),
        recipe("4 KiB, 8-bit", "cluster_size=4k,refcount_bits=8", 4096),
        recipe("4 KiB, 32-bit", "cluster_size=4k,refcount_bits=32", 4096),
        Recipe {
            compressed: true,
            snapshots: 2,
            ..recipe("4 KiB, 4-bit, all", "cluster_size=4k,refcount_bits=4", 4096)
        },
        Recipe { snapshots: 2, ..recipe("v2", "compat=0.10,cluster_size=4k", 4096) },
        Recipe { compressed: true, ..recipe("16 KiB, extended", "cluster_size=16k,extended_l2=on", 16384) },
        Recipe {
            compressed: true,
            snapshots: 2,
            bitmaps: true,
            ..recipe("16 KiB, extended, all", "cluster_size=16k,extended_l2=on,refcount_bits=64", 16384)
        },
        Recipe { bitmaps: true, ..recipe("4 KiB, bitmaps", "cluster_size=4k", 4096) },
        recipe("data file", "cluster_size=64k,data_file=data.raw", 65536),
    ]
}

/// Makes the image; returns its path.
pub fn make(dir: &qemu::Dir, recipe: &Recipe) -> String {
    let (path, unit) = (dir.path("image.qcow2"), recipe.cluster);
    let _ = std::fs::remove_file(&path);
    let options = recipe.options.replace("data.raw", &dir.path("data.raw"));
    qemu::img(&["create", "-q", "-f", "qcow2", "-o", &options, &path, &(200 * unit).to_string()]);
    let write = |flags: &str, at: u64, n: u64| format!("write -q {flags} {} {}", at * unit, n * unit);
    let mut commands = vec![write("-P 1", 0, 6), write("-P 2", 100, 3), write("-P 3", 8, 2)];
    if !options.contains("0.10") {
        commands.push(write("-z", 20, 4));
        commands.push(write("-z", 8, 1));
    }
    if recipe.compressed {
        commands.extend([30, 31, 32].map(|at| write("-c -P 4", at, 1)));
    }
    qemu::io(&path, &commands.iter().map(String::as_str).collect::<Vec<_>>());
    for n in 0..recipe.snapshots {
        qemu::img(&["snapshot", "-c", &format!("s{n}"), &path]);
        qemu::io(&path, &[&write("-P 5", u64::from(n), 2), &write("-P 6", 50 + u64::from(n), 1)]);
    }
    if recipe.bitmaps {
        qemu::img(&["bitmap", "--add", &path, "b0"]);
        qemu::img(&["bitmap", "--add", "-g", "512", &path, "b1"]);
        qemu::io(&path, &[&write("-P 7", 3, 2)]);
    }
    path
}

/// Something wrong.
pub struct Damage {
    pub name: String,
    /// Bytes and where they go.
    pub writes: Vec<(usize, Vec<u8>)>,
    /// Nothing is left after a repair, as QEMU sees it.
    pub repairable: bool,
    /// Why QEMU tells it otherwise, if it does.
    pub differs: Option<&'static str>,
}

/// The image with some bytes replaced.
pub fn damaged(sound: &[u8], damage: &Damage) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for (at, value) in &damage.writes {
        let end = at + value.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[*at..end].copy_from_slice(value);
    }
    bytes
}

/// Where the structures of a sound image are.
struct Places<'a> {
    bytes: &'a [u8],
    cluster: u64,
    entry: u64,
    order: u32,
    l1: u64,
    table: u64,
    block: u64,
    l2: u64,
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

impl<'a> Places<'a> {
    fn of(bytes: &'a [u8], cluster: u64) -> Self {
        let word = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
        let v3 = bytes[7] == 3;
        let (l1, table) = (word(40), word(48));
        Self {
            bytes,
            cluster,
            entry: if v3 && word(72) >> 4 & 1 == 1 { 16 } else { 8 },
            order: if v3 { (word(96) >> 32) as u32 } else { 4 },
            l1,
            table,
            block: word(table),
            l2: word(l1) & OFFSET,
        }
    }

    fn word(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes[at as usize..][..8].try_into().unwrap())
    }

    fn l2_entry(&self, index: u64) -> u64 {
        self.l2 + index * self.entry
    }

    /// Host offset of the cluster that guest cluster `index` is in.
    fn host(&self, index: u64) -> u64 {
        self.word(self.l2_entry(index)) & OFFSET
    }

    fn max(&self) -> u64 {
        u64::MAX >> (64 - (1 << self.order))
    }

    fn end(&self) -> u64 {
        (self.bytes.len() as u64).next_multiple_of(self.cluster)
    }

    /// The bytes that change the count of a cluster (of the first block) to `count`, and their place.
    fn count(&self, offset: u64, count: u64) -> (usize, Vec<u8>) {
        let index = offset / self.cluster;
        let bits = 1u64 << self.order;
        let at = (self.block + index * bits / 8) as usize;
        if bits >= 8 {
            let width = (bits / 8) as usize;
            return (at, count.to_be_bytes()[8 - width..].to_vec());
        }
        let shift = index * bits % 8;
        let mask = ((1u64 << bits) - 1) as u8;
        (at, vec![self.bytes[at] & !(mask << shift) | (count as u8) << shift])
    }
}

fn word(at: u64, value: u64) -> (usize, Vec<u8>) {
    (at as usize, value.to_be_bytes().to_vec())
}

type Add<'a> = &'a mut dyn FnMut(&str, Vec<(usize, Vec<u8>)>, bool, Option<&'static str>);

/// One thing wrong at a time, and some two.
pub fn damages(sound: &[u8], recipe: &Recipe) -> Vec<Damage> {
    let places = Places::of(sound, recipe.cluster);
    let mut list = Vec::new();
    let mut add = |name: &str, writes: Vec<(usize, Vec<u8>)>, repairable, differs| {
        list.push(Damage { name: name.to_owned(), writes, repairable, differs });
    };
    counts(&places, recipe, &mut add);
    if !recipe.options.contains("data_file") {
        l2_entries(&places, recipe, &mut add);
    }
    tables(&places, &mut add);
    list
}

fn counts(places: &Places<'_>, recipe: &Recipe, add: Add<'_>) {
    let max = places.max();
    let data = if recipe.options.contains("data_file") { places.l2 } else { places.host(4) };
    for (what, at) in [("header", 0), ("L1 table", places.l1), ("L2 table", places.l2), ("data", data)] {
        for count in [0, 1, 2, 3, max] {
            if count <= max {
                add(&format!("count of {what} is {count}"), vec![places.count(at, count)], true, None);
            }
        }
    }
    let last = places.end() - places.cluster;
    add("last cluster is counted twice", vec![places.count(last, 2.min(max))], true, None);
    add("the refcount block is counted 0 times", vec![places.count(places.block, 0)], true, None);
    if places.bytes[7] == 3 {
        add("dirty", vec![word(72, places.word(72) | 1), places.count(places.l1, 0)], true, None);
    }
}

fn l2_entries(places: &Places<'_>, recipe: &Recipe, add: Add<'_>) {
    let at = |index| places.l2_entry(index);
    let (end, cluster) = (places.end(), places.cluster);
    let plain = places.host(4) | COPIED;
    let is_wide = places.order > 0;
    add("data is not COPIED", vec![word(at(4), places.host(4))], true, None);
    add("L2 table is not COPIED", vec![word(places.l1, places.l2)], true, None);
    add("two entries, one cluster", vec![word(at(5), plain)], is_wide, None);
    add("an entry past the end", vec![word(at(5), COPIED | (end + 64 * cluster))], false, None);
    add("an entry right past the end", vec![word(at(5), COPIED | end)], false, None);
    add("an entry far past the end", vec![word(at(5), 0x00ff_ffff_ffff_0000 & !(cluster - 1))], false, None);
    add("an entry with reserved bits", vec![word(at(5), places.word(at(5)) | 1 << 57)], false, None);
    add("COPIED without a cluster", vec![word(at(60), COPIED)], true, Some("COPIED without a cluster"));
    if cluster > 512 {
        add("data is not aligned", vec![word(at(4), plain + 512)], false, None);
    }
    for (what, to) in [
        ("L1 table", places.l1),
        ("L2 table", places.l2),
        ("refcount table", places.table),
        ("refcount block", places.block),
    ] {
        add(&format!("an entry points to the {what}"), vec![word(at(5), COPIED | to)], true, None);
    }
    if places.entry == 16 {
        add("allocated and zero", vec![word(at(4) + 8, 0x1_0000_0001)], false, None);
        add("allocated without a cluster", vec![word(at(60) + 8, 1)], false, None);
        add("preallocated and not aligned", vec![word(at(4), plain + 512), word(at(4) + 8, 0)], true, None);
        add("bit 0 of the descriptor", vec![word(at(4), plain | 1)], true, None);
    } else if places.bytes[7] == 3 && cluster > 512 {
        add("preallocated and not aligned", vec![word(at(4), plain + 512 + 1)], true, None);
    }
    if recipe.compressed {
        let entry = places.word(at(31));
        add("a compressed entry with COPIED", vec![word(at(31), entry | COPIED)], true, None);
        if places.entry == 16 {
            let class = Some("bitmap of a compressed cluster");
            add("a compressed entry with a bitmap", vec![word(at(31) + 8, 1)], true, class);
        }
    }
}

fn tables(places: &Places<'_>, add: Add<'_>) {
    let outside = places.end() + 64 * places.cluster;
    add("L1 entry with reserved bits", vec![word(places.l1, places.word(places.l1) | 1 << 60)], false, None);
    add("L1 entry past the end", vec![word(places.l1, outside | COPIED)], false, None);
    if places.cluster == 512 {
        let class = Some("COPIED without a cluster");
        add("L1 entry of nothing but COPIED", vec![word(places.l1 + 8, COPIED)], true, class);
    }
    let class = Some("refcount block that is not aligned");
    if places.cluster > 512 {
        add("refcount block is not aligned", vec![word(places.table, places.block + 512)], true, class);
    }
    add("refcount block past the end", vec![word(places.table, outside)], true, None);
    add("no refcount block", vec![word(places.table, 0)], true, None);
    add("two entries, one refcount block", vec![word(places.table + 8, places.block)], true, None);
    let class = Some("refcount table that cannot be one");
    add("refcount table is not aligned", vec![word(48, places.table + 8)], true, class);
    add("refcount table past the end", vec![word(48, outside)], true, class);
    add("refcount table at 0", vec![word(48, 0)], true, class);
    add("refcount table of no clusters", vec![(56, vec![0; 4])], true, class);
    add("refcount table of too many clusters", vec![(56, vec![0xff; 4])], true, class);
    add("refcount table where the L1 table is", vec![word(48, places.l1)], true, class);
}
