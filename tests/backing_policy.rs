//! Names of backing files are input of whoever made the image. Each hostile or broken one, under each policy: what is
//! refused says why, nothing hangs, and no file is changed.

mod qemu;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use qcow2::error::{Error, ErrorCode, Result};
use qcow2::image::{BackingFormat, BackingPolicy, CreateOptions, Image, MissingFormat, OpenOptions, Resolver, create};
use qcow2::storage::Storage;
use qcow2::storage::memory::MemoryStorage;

use BackingPolicy::{Any, Deny, Relative};

const SIZE: u64 = 1 << 20;

/// Folder `dir/in` with images in it, folder `dir/out` with what must not be reached.
struct Scene(qemu::Dir);

impl Scene {
    fn new(name: &str) -> Self {
        let scene = Self(qemu::Dir::new(&format!("backing-{name}")));
        fs::create_dir_all(scene.path("in/sub")).unwrap();
        fs::create_dir_all(scene.path("out")).unwrap();
        fs::write(scene.path("in/base.raw"), vec![1; SIZE as usize]).unwrap();
        fs::write(scene.path("in/sub/base.raw"), vec![1; SIZE as usize]).unwrap();
        fs::write(scene.path("out/secret.raw"), vec![9; SIZE as usize]).unwrap();
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(self.0.path(name))
    }

    /// An image in `in/` that refers to `backing`.
    fn image(&self, name: &str, backing: &str, format: BackingFormat) -> PathBuf {
        let path = self.path(&format!("in/{name}"));
        let options = CreateOptions {
            cluster_size_bytes: 4096,
            backing_file: Some(backing.to_owned()),
            backing_fmt: Some(format),
            ..CreateOptions::default()
        };
        create(&path, SIZE, &options, true).unwrap();
        path
    }

    /// Every file, with its bytes.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.path("in"), self.path("out")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_symlink() || kind.is_fifo() {
                    files.insert(entry.path(), Vec::new());
                } else {
                    files.insert(entry.path(), fs::read(entry.path()).unwrap());
                }
            }
        }
        files
    }
}

fn options(backing: BackingPolicy) -> OpenOptions {
    OpenOptions { backing, ..OpenOptions::default() }
}

/// Opens, reads the first byte, and closes; gives up on a call that does not come back.
fn open(path: &Path, options: &OpenOptions) -> Result<u8> {
    let (path, options) = (path.to_path_buf(), options.clone());
    let (done, finished) = mpsc::channel();
    std::thread::spawn(move || {
        let outcome = Image::open(&path, &options).and_then(|image| {
            let mut byte = [0];
            image.pread(&mut byte, 0)?;
            image.close()?;
            Ok(byte[0])
        });
        done.send(outcome).unwrap();
    });
    finished.recv_timeout(Duration::from_secs(20)).expect("the open hangs")
}

/// What an open is expected to end with.
enum End {
    /// The first byte of the disk.
    Reads(u8),
    /// A code, a system error number, and a part of the text.
    Fails(ErrorCode, i32, &'static str),
}

use End::{Fails, Reads};

const DENIED: End = Fails(ErrorCode::BackingDenied, libc::EACCES, "set option 'backing' to 'relative' or 'any'");
const PROTOCOL: End =
    Fails(ErrorCode::BackingDenied, libc::EACCES, "names with a protocol or 'json:' are not followed");
const OUTSIDE: End = Fails(ErrorCode::BackingDenied, libc::EACCES, "leads out of the image's folder");
const MISSING: End = Fails(ErrorCode::Io, libc::ENOENT, "No such file");
const NO_FILE: End = Fails(ErrorCode::Argument, libc::EINVAL, "neither a regular file nor a block device");

#[track_caller]
fn expect(what: &str, name: &str, result: Result<u8>, end: &End) {
    match (result, end) {
        (Ok(byte), Reads(expected)) => assert_eq!(byte, *expected, "{what}"),
        (Err(e), Fails(code, errno, part)) => {
            let text = e.to_string();
            assert_eq!((e.code(), e.errno()), (*code, *errno), "{what}: {text}");
            assert!(text.contains(part), "{what}: {part:?} is not in {text:?}");
            assert!(text.contains(name), "{what}: the backing file is not named in {text:?}");
        }
        (Ok(byte), Fails(code, ..)) => panic!("{what}: opened and read {byte}, instead of {code:?}"),
        (Err(e), Reads(_)) => panic!("{what}: {e}"),
    }
}

/// Names, and what they end with under `relative` and under `any`. Under `none` all are denied.
fn names(scene: &Scene) -> Vec<(String, End, End)> {
    let text = |name: &str| scene.path(name).to_str().unwrap().to_owned();
    let case = |name: &str, relative, any| (name.to_owned(), relative, any);
    vec![
        case("base.raw", Reads(1), Reads(1)),
        case("sub/base.raw", Reads(1), Reads(1)),
        case("./base.raw", Reads(1), Reads(1)),
        case("sub/../base.raw", Reads(1), Reads(1)),
        case(".//sub///base.raw", Reads(1), Reads(1)),
        case("missing.raw", MISSING, MISSING),
        case("json:{\"file\":{\"driver\":\"file\",\"filename\":\"base.raw\"}}", PROTOCOL, PROTOCOL),
        case("nbd://localhost/disk", PROTOCOL, PROTOCOL),
        case("nbd+unix:///disk?socket=/run/s", PROTOCOL, PROTOCOL),
        case("https://localhost/disk", PROTOCOL, PROTOCOL),
        case("fat:rw:sub", PROTOCOL, PROTOCOL),
        case("file:base.raw", PROTOCOL, PROTOCOL),
        case(":base.raw", PROTOCOL, PROTOCOL),
        case(&text("out/secret.raw"), OUTSIDE, Reads(9)),
        case(&text("in/base.raw"), OUTSIDE, Reads(1)),
        case("../out/secret.raw", OUTSIDE, Reads(9)),
        case("sub/../../out/secret.raw", OUTSIDE, Reads(9)),
        case("../in/base.raw", OUTSIDE, Reads(1)),
        case("link-out", OUTSIDE, Reads(9)),
        case("link-absolute", OUTSIDE, Reads(9)),
        case("folder-out/secret.raw", OUTSIDE, Reads(9)),
        case("link-inside", Reads(1), Reads(1)),
        case("sub/link-up", Reads(1), Reads(1)),
        case("link-to-itself", OUTSIDE, Fails(ErrorCode::Io, libc::ELOOP, "symbolic links")),
        case("/proc/self/root", OUTSIDE, NO_FILE),
        case("fifo", NO_FILE, NO_FILE),
        case("sub", NO_FILE, NO_FILE),
        case(".", NO_FILE, NO_FILE),
        case("..", OUTSIDE, NO_FILE),
        case("/dev/zero", OUTSIDE, NO_FILE),
        case("/dev/tty-that-is-not-there", OUTSIDE, MISSING),
        case("device-link", OUTSIDE, NO_FILE),
        case(
            "base.raw/",
            Fails(ErrorCode::Io, libc::ENOTDIR, "directory"),
            Fails(ErrorCode::Io, libc::ENOTDIR, "directory"),
        ),
        case(
            "base.raw/x",
            Fails(ErrorCode::Io, libc::ENOTDIR, "directory"),
            Fails(ErrorCode::Io, libc::ENOTDIR, "directory"),
        ),
        case(
            &"x".repeat(300),
            Fails(ErrorCode::Io, libc::ENAMETOOLONG, "too long"),
            Fails(ErrorCode::Io, libc::ENAMETOOLONG, "too long"),
        ),
    ]
}

#[test]
fn each_name_under_each_policy() {
    let scene = Scene::new("names");
    symlink("../out/secret.raw", scene.path("in/link-out")).unwrap();
    symlink(scene.path("out/secret.raw"), scene.path("in/link-absolute")).unwrap();
    symlink("../out", scene.path("in/folder-out")).unwrap();
    symlink("sub/base.raw", scene.path("in/link-inside")).unwrap();
    symlink("../base.raw", scene.path("in/sub/link-up")).unwrap();
    symlink("link-to-itself", scene.path("in/link-to-itself")).unwrap();
    symlink("/dev/zero", scene.path("in/device-link")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(scene.path("in/fifo")).status().unwrap().success());
    for (name, relative, any) in names(&scene) {
        let image = scene.image("image", &name, BackingFormat::Raw);
        let before = scene.files();
        for (policy, end) in [(Deny, &DENIED), (Relative, &relative), (Any, &any)] {
            expect(&format!("{name} under {policy:?}"), &name, open(&image, &options(policy)), end);
            // What the caller gives goes before every policy and name.
            let given: Arc<dyn Storage> = Arc::new(MemoryStorage::new(vec![5; 512]));
            let given = OpenOptions { backing_storages: vec![given], ..options(policy) };
            expect(&format!("{name} under {policy:?}, given"), &name, open(&image, &given), &Reads(5));
        }
        // Nothing of a backing file is needed to look at the image.
        let inspect = OpenOptions { inspect: true, ..options(Any) };
        assert_eq!(Image::open(&image, &inspect).unwrap().info().backing.unwrap().name, name);
        assert!(scene.files() == before, "{name}: a file was changed");
    }
}

struct Asked(Mutex<Vec<(String, BackingFormat, u32)>>, bool);

impl Resolver for Asked {
    fn resolve(&self, name: &str, format: BackingFormat, depth: u32) -> Result<Arc<dyn Storage>> {
        self.0.lock().unwrap().push((name.to_owned(), format, depth));
        match self.1 {
            true => Ok(Arc::new(MemoryStorage::new(vec![6; 512]))),
            false => Err(Error::BackingDenied { name: name.to_owned(), hint: "the resolver knows better" }),
        }
    }
}

#[test]
fn a_resolver_is_asked_instead_of_the_policy() {
    let scene = Scene::new("resolver");
    for name in ["nbd://localhost/disk", "/etc/passwd", "../out/secret.raw", "base.raw", "json:{}"] {
        let image = scene.image("image", name, BackingFormat::Raw);
        for policy in [Deny, Relative, Any] {
            for grants in [true, false] {
                let asked = Arc::new(Asked(Mutex::default(), grants));
                let result = open(&image, &OpenOptions { resolver: Some(asked.clone()), ..options(policy) });
                let refusal = Fails(ErrorCode::BackingDenied, libc::EACCES, "the resolver knows better");
                expect(name, name, result, if grants { &Reads(6) } else { &refusal });
                assert_eq!(*asked.0.lock().unwrap(), [(name.to_owned(), BackingFormat::Raw, 0)]);
            }
        }
    }
}

/// L1 of the known holes: in QEMU, a backing chain that refers to itself never finishes opening.
#[test]
fn l1_loops_are_noticed_by_any_name() {
    let scene = Scene::new("loops");
    let looped = Fails(ErrorCode::Chain, libc::ELOOP, "already part of the backing chain");
    let check = |what: &str, image: &Path, name: &str| {
        let before = scene.files();
        for policy in [Relative, Any] {
            expect(what, name, open(image, &options(policy)), &looped);
        }
        assert!(scene.files() == before, "{what}: a file was changed");
    };
    check("self", &scene.image("self", "self", BackingFormat::Qcow2), "self");
    check("self, longer", &scene.image("self", "sub/../self", BackingFormat::Qcow2), "sub/../self");
    scene.image("b", "a", BackingFormat::Qcow2);
    check("two", &scene.image("a", "b", BackingFormat::Qcow2), "a");
    symlink("c", scene.path("in/to-c")).unwrap();
    check("through a symbolic link", &scene.image("c", "to-c", BackingFormat::Qcow2), "to-c");
    let d = scene.image("d", "also-d", BackingFormat::Qcow2);
    fs::hard_link(&d, scene.path("in/also-d")).unwrap();
    check("through a hard link", &d, "also-d");
    // Raw is no excuse: the image would change under its own reads.
    check("self, as raw", &scene.image("raw-self", "raw-self", BackingFormat::Raw), "raw-self");
}

#[test]
fn chains_end_at_the_limit() {
    let scene = Scene::new("deep");
    let mut below = "base.raw".to_owned();
    for i in 0..6 {
        let name = format!("level-{i}");
        scene.image(&name, &below, if i == 0 { BackingFormat::Raw } else { BackingFormat::Qcow2 });
        below = name;
    }
    let top = scene.path("in/level-5");
    for limit in 0..8 {
        let end = if limit >= 6 {
            Reads(1)
        } else {
            Fails(ErrorCode::Chain, libc::ELOOP, "raise option 'backing_depth_max'")
        };
        expect(
            &limit.to_string(),
            "",
            open(&top, &OpenOptions { backing_depth_max: limit, ..options(Relative) }),
            &end,
        );
    }
}

/// Puts another text of the same length into the first cluster.
fn rename(path: &Path, from: &[u8], to: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.windows(from.len()).position(|w| w == from).unwrap();
    bytes[at..at + from.len()].copy_from_slice(to);
    fs::write(path, bytes).unwrap();
}

#[test]
fn formats_are_declared_or_refused() {
    let scene = Scene::new("formats");
    let unsupported = |part| Fails(ErrorCode::BackingFormat, libc::ENOTSUP, part);
    for (stored, part) in [("vmdk\0", "'vmdk'"), ("QCOW2", "'QCOW2'"), ("qcow\0", "'qcow'"), ("luks\0", "'luks'")] {
        let image = scene.image("image", "base.raw", BackingFormat::Qcow2);
        // The extension: type, length, and the format padded to 8 bytes.
        let length = stored.trim_end_matches('\0').len() as u8;
        let extension = |length, text: &str| [b"\xe2\x79\x2a\xca\0\0\0", &[length][..], text.as_bytes()].concat();
        rename(&image, &extension(5, "qcow2"), &extension(length, stored));
        expect(stored, "base.raw", open(&image, &options(Any)), &unsupported(part));
    }
    // No declared format: the extension becomes one that nobody knows.
    let image = scene.image("image", "base.raw", BackingFormat::Raw);
    rename(&image, b"\xe2\x79\x2a\xca", b"\x01\x02\x03\x04");
    for policy in [Relative, Any] {
        expect("no format", "base.raw", open(&image, &options(policy)), &unsupported("has no declared format"));
        let raw = OpenOptions { backing_fmt_missing: MissingFormat::Raw, ..options(policy) };
        expect("no format, taken as raw", "", open(&image, &raw), &Reads(1));
    }
    // A name is text without zero bytes: what C reads of it would be another name than what Rust does.
    for stored in [&b"base\0raw"[..], b"base\xffraw"] {
        let image = scene.image("image", "base.raw", BackingFormat::Raw);
        rename(&image, b"base.raw", stored);
        let named = Fails(ErrorCode::BadHeader, libc::EINVAL, "backing file name");
        expect("a name that is no text", "", open(&image, &options(Any)), &named);
    }
    // Declared as qcow2, and it is not; never the other way round by guessing.
    let image = scene.image("image", "base.raw", BackingFormat::Qcow2);
    let not = Fails(ErrorCode::NotQcow2, libc::EINVAL, "not a qcow2 image: it starts with 0x01010101");
    expect("raw content", "base.raw", open(&image, &options(Relative)), &not);
    fs::write(scene.path("in/empty"), []).unwrap();
    let image = scene.image("image", "empty", BackingFormat::Qcow2);
    let short = Fails(ErrorCode::BadHeader, libc::EINVAL, "file length is 0");
    expect("empty content", "empty", open(&image, &options(Relative)), &short);
    scene.image("inner", "base.raw", BackingFormat::Raw);
    let image = scene.image("image", "inner", BackingFormat::Raw);
    expect("qcow2 content, declared raw", "", open(&image, &options(Relative)), &Reads(b'Q'));
}

#[test]
fn backing_files_of_any_length() {
    let scene = Scene::new("lengths");
    for length in [0, 1, 511, 4095, 4096, 5000, SIZE - 1, SIZE, SIZE + 4097] {
        let below: Vec<u8> = (0..length).map(|i| (i % 251) as u8 | 1).collect();
        fs::write(scene.path("in/below"), &below).unwrap();
        let path = scene.image("image", "below", BackingFormat::Raw);
        let mut expected = below.clone();
        expected.resize(SIZE as usize, 0);
        let image = Image::open(&path, &options(Relative)).unwrap();
        let mut seen = vec![7; SIZE as usize];
        image.pread(&mut seen, 0).unwrap();
        assert!(seen == expected, "over {length} bytes");
        for at in [4000, length.saturating_sub(10).min(SIZE - 300), SIZE - 200] {
            image.pwrite(&[0xee; 200], at).unwrap();
            expected[at as usize..][..200].fill(0xee);
        }
        image.pread(&mut seen, 0).unwrap();
        assert!(seen == expected, "over {length} bytes, after writes");
        image.close().unwrap();
        assert!(fs::read(scene.path("in/below")).unwrap() == below, "the backing file was written");
        if qemu::dir("backing-lengths-qemu").is_some() {
            qemu::check(path.to_str().unwrap(), false);
        }
    }
}

#[test]
fn names_of_backing_files_start_from_the_file_that_holds_them() {
    let scene = Scene::new("folders");
    // in/top -> in/sub/middle -> in/sub/base.raw, and a way out that only looks like one from `sub`.
    fs::write(scene.path("in/sub/base.raw"), vec![4; 4096]).unwrap();
    scene.image("sub/middle", "base.raw", BackingFormat::Raw);
    let top = scene.image("top", "sub/middle", BackingFormat::Qcow2);
    for policy in [Relative, Any] {
        expect("below", "", open(&top, &options(policy)), &Reads(4));
    }
    scene.image("sub/middle", "../base.raw", BackingFormat::Raw);
    for policy in [Relative, Any] {
        expect("up again, still inside", "", open(&top, &options(policy)), &Reads(1));
    }
    scene.image("sub/middle", "../../out/secret.raw", BackingFormat::Raw);
    expect("out of the folder of the image", "../../out/secret.raw", open(&top, &options(Relative)), &OUTSIDE);
    // By storage there is no folder.
    let bytes = fs::read(&top).unwrap();
    let result = Image::open_storage(Arc::new(MemoryStorage::new(bytes)), &options(Relative)).map(|_| 0);
    expect("no folder", "sub/middle", result, &Fails(ErrorCode::BackingDenied, libc::EACCES, "was not opened by path"));
}
