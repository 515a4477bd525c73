using System.Runtime.InteropServices;
using System.Security.Cryptography;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// A GPU that fails: while it is opened, in the middle of a run, at each kind of call; and what is
/// on the disk for it, libraries and compiled modules, damaged, planted or foreign. The driver is a
/// stub; no GPU and no emulator is needed.
/// </summary>
[TestFixture]
[NonParallelizable]
public sealed class CudaFailureTests
{
    private const int OutOfMemory = 2, IllegalAddress = 700, Unknown = 999;

    private string _folder = "";
    private TrainArguments _arguments = new();

    [SetUp]
    public void MakeFolder()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        _arguments = Runs.OneRow(_folder) with
        {
            Device = DeviceChoice.Cuda,
            MaxSteps = 4,
            SaveSteps = new Interval(2),
            LoggingSteps = new Interval(1),
        };
    }

    [TearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    /// <summary>What a run calls again and again.</summary>
    private static readonly string[] s_needed =
    [
        nameof(CudaDriverApi.MemcpyHtoDAsync), nameof(CudaDriverApi.MemcpyDtoHAsync),
        nameof(CudaDriverApi.MemcpyDtoDAsync), nameof(CudaDriverApi.StreamSynchronize),
        nameof(CudaDriverApi.StreamWaitEvent), nameof(CudaDriverApi.EventRecord),
        nameof(CudaDriverApi.EventSynchronize), nameof(CudaDriverApi.LaunchKernel),
        nameof(CublasApi.GemmEx),
    ];

    /// <summary>
    /// From the first checkpoint on. What a run calls again fails it with one line that names the
    /// call, and the checkpoint stays as it was.
    /// </summary>
    [TestCaseSource(nameof(s_needed))]
    public void AnErrorInTheMiddleKeepsTheCheckpoint(string call)
    {
        var stub = new StubCuda();
        bool product = call == nameof(CublasApi.GemmEx);
        object table = product ? stub.Cublas : stub.Driver;
        string[]? before = null;
        string checkpoint = RunFolder.Checkpoint(_arguments.OutputDir, 2);
        var screen = new At("saved ", () =>
        {
            before = Digests(checkpoint);
            StubCuda.Break(table, call, Unknown);
        });
        var failure = Assert.Throws<CudaException>(() =>
            Runs.Train(_arguments, screen: screen, devices: stub.Devices))!;
        Assert.That(failure.Message, Does.StartWith((product ? "cublas" : "cu") + call + ": ")
            .And.Not.Contain("\n"));
        Assert.That($"{screen}", Does.Contain("go on with --resume_from_checkpoint true"));
        Assert.That(before, Is.Not.Null);
        Assert.That(Digests(checkpoint), Is.EqualTo(before));
        Assert.That(Directory.GetFileSystemEntries(_arguments.OutputDir)
            .Where(path => path.EndsWith(".tmp", StringComparison.Ordinal)), Is.Empty);
        Runs.Train(_arguments with { ResumeFromCheckpoint = new ResumePoint(null) },
            devices: new StubCuda().Devices);
        Assert.That(File.Exists(RunFolder.Checkpoint(_arguments.OutputDir, 4)
            + "/adapter_model.safetensors"));
    }

    /// <summary>All calls that a warm run does not need, or only for what it says and
    /// frees.</summary>
    [Test]
    public void OtherCallsLoseNothing()
    {
        var stub = new StubCuda();
        var screen = new At("saved ", () =>
        {
            foreach (object table in (object[])[stub.Driver, stub.Cublas, stub.Nvrtc])
                foreach (string call in StubCuda.Calls(table).Except([.. s_needed, "EventQuery"]))
                    StubCuda.Break(table, call, Unknown);
        });
        Runs.Train(_arguments, screen: screen, devices: stub.Devices);
        Assert.That(File.Exists(_arguments.OutputDir + "/adapter_model.safetensors"));
    }

    /// <summary>Whether a run asks depends on how fast its rows come.</summary>
    [Test]
    public void AnEventThatCannotBeAskedIsNamed()
    {
        const int notReady = 600;
        var stub = new StubCuda();
        using OpenDevice opened = stub.Devices.Open(_arguments);
        using var reached = new CudaEvent(((CudaDevice)opened.Device).Context);
        Assert.That(reached.IsReached());
        StubCuda.Break(stub.Driver, nameof(CudaDriverApi.EventQuery), notReady);
        Assert.That(reached.IsReached(), Is.False);
        StubCuda.Break(stub.Driver, nameof(CudaDriverApi.EventQuery), Unknown);
        Assert.That(reached.IsReached, Throws.TypeOf<CudaException>()
            .With.Message.StartsWith("cuEventQuery: CUDA_ERROR_STUB: as the test asks"));
    }

    /// <summary>One allocation of a run that goes on, and then a later one, is the first that the
    /// GPU has no room for.</summary>
    [Test]
    public void AGpuThatIsFullKeepsTheCheckpoint()
    {
        Runs.Train(_arguments, devices: new StubCuda().Devices);
        Directory.Delete(RunFolder.Checkpoint(_arguments.OutputDir, 4), recursive: true);
        string checkpoint = RunFolder.Checkpoint(_arguments.OutputDir, 2);
        string[] before = Digests(checkpoint);
        TrainArguments goesOn = _arguments with { ResumeFromCheckpoint = new ResumePoint(null) };
        int room = 0;
        for (bool isFull = true; isFull; room += 7)
        {
            try
            {
                Runs.Train(goesOn, devices: new StubCuda { Room = room }.Devices);
                isFull = false;
            }
            catch (Exception e) when (e is InputException or RunException or DeviceMemoryException)
            {
                Assert.That(e.Message, Does.Contain("bytes are needed on Stub").And.Not.Contain("\n"),
                    $"room for {room}");
                Assert.That(Digests(checkpoint), Is.EqualTo(before), $"room for {room}");
            }
        }

        Assert.That(room, Is.GreaterThan(21));
        Assert.That(File.Exists(RunFolder.Checkpoint(_arguments.OutputDir, 4)
            + "/adapter_model.safetensors"));
    }

    /// <summary>Exit code and words of the program.</summary>
    [Test]
    public void TheExitCodeIsOne()
    {
        var stub = new StubCuda();
        var (output, error) = (new StringWriter(), new StringWriter());
        var runners = new Runners
        {
            Train = (arguments, log, stop) =>
            {
                StubCuda.Break(stub.Driver, nameof(CudaDriverApi.EventRecord), Unknown);
                TrainRun.Run(_arguments, log, stop, stub.Devices);
            },
        };
        int code = new CommandLine(output, error, runners).Run(["train", "--model_name_or_path",
            _arguments.ModelNameOrPath!, "--data_path", $"{_arguments.DataPath}"]);
        Assert.That(code, Is.EqualTo(1));
        Assert.That($"{error}", Does.StartWith("cpmx: cuEventRecord: CUDA_ERROR_STUB: as the test asks"));
    }

    // Errors of kernels stay and come out anywhere.
    [Test]
    public void AnErrorOfEarlierWorkIsNotPinnedOnTheCallThatNoticedIt()
    {
        var stub = new StubCuda();
        StubCuda.Break(stub.Driver, nameof(CudaDriverApi.LaunchKernel), IllegalAddress,
            "CUDA_ERROR_ILLEGAL_ADDRESS");
        var failure = Assert.Throws<InputException>(() =>
            Runs.Train(_arguments, devices: stub.Devices))!;
        Assert.That(failure.Message, Does.Contain(
            "cuda: CUDA_ERROR_ILLEGAL_ADDRESS: as the test asks, in work queued before; noticed at "
            + "cuLaunchKernel (fill_real").And.Contain("CUDA_LAUNCH_BLOCKING=1"));
    }

    /// <summary>Each call that opens a device: the CPU is taken, or the call is named.</summary>
    [TestCase(nameof(CudaDriverApi.DeviceGet), Unknown)]
    [TestCase(nameof(CudaDriverApi.DeviceGetAttribute), Unknown)]
    [TestCase(nameof(CudaDriverApi.DevicePrimaryCtxRetain), OutOfMemory)]
    [TestCase(nameof(CudaDriverApi.CtxSetCurrent), Unknown)]
    [TestCase(nameof(CudaDriverApi.MemAlloc), OutOfMemory)]
    [TestCase(nameof(CudaDriverApi.MemHostAlloc), Unknown)]
    [TestCase(nameof(CudaDriverApi.StreamCreate), Unknown)]
    [TestCase(nameof(CudaDriverApi.EventCreate), Unknown)]
    [TestCase(nameof(CudaDriverApi.ModuleLoadDataEx), Unknown)]
    [TestCase(nameof(CudaDriverApi.ModuleGetFunction), Unknown)]
    [TestCase(nameof(CudaDriverApi.LaunchKernel), Unknown)]
    [TestCase(nameof(CudaDriverApi.MemcpyDtoHAsync), Unknown)]
    [TestCase(nameof(CudaDriverApi.MemGetInfo), Unknown)]
    public void AGpuThatCannotBeOpenedLeavesTheCpu(string call, int code)
    {
        var stub = new StubCuda();
        StubCuda.Break(stub.Driver, call, code);
        string said = "";
        using (OpenDevice device = stub.Devices.Open(
            _arguments with { Device = DeviceChoice.Auto }, line => said += line))
            Assert.That(device.Name, Does.StartWith("CPU"));
        Assert.That(said, Does.EndWith("; computing on the CPU").And.Not.Contain("\n"));
        Assert.That(said, Does.Contain(call == nameof(CudaDriverApi.MemAlloc)
            ? "bytes are needed on Stub" : $"cu{call}: "));
        var failure = Assert.Throws<InputException>(() => stub.Devices.Open(_arguments))!;
        Assert.That(failure.Message, Does.StartWith("device is cuda, which cannot be used: "));
    }

    /// <summary>
    /// Every call of the tables, failing from the start, so that none can be forgotten: it is named
    /// and the CPU is taken, or a device needs none of it to be opened.
    /// </summary>
    [Test]
    public void NoCallFailsUnnamedWhileADeviceIsOpened()
    {
        var idle = new List<string>();
        for (int table = 0; table < 3; table++)
        {
            foreach (string call in StubCuda.Calls(Table(new StubCuda(), table)))
            {
                var stub = new StubCuda();
                StubCuda.Break(Table(stub, table), call, Unknown);
                string said = "";
                using OpenDevice device = stub.Devices.Open(
                    _arguments with { Device = DeviceChoice.Auto }, line => said += line);
                string name = (table == 0 ? "cu" : table == 1 ? "cublas" : "nvrtc") + call;
                if (device.Device is CudaDevice) idle.Add(name);
                else
                    Assert.That(said, Does.Contain($"{name}: ").IgnoreCase
                        .And.EndWith("; computing on the CPU").And.Not.Contain("\n"));
            }
        }

        Assert.That(idle, Is.EqualTo(s_idle), string.Join(" ", idle));

        static object Table(StubCuda stub, int table) =>
            table == 0 ? stub.Driver : table == 1 ? stub.Cublas : stub.Nvrtc;
    }

    private static readonly string[] s_idle =
    [
        // Before there is a device, or when it is closed.
        "cuInit", "cuDeviceGetCount", "cuDeviceTotalMem", "cuDevicePrimaryCtxRelease",
        "cuCtxSynchronize", "cuMemFree", "cuMemFreeHost",
        // In training alone.
        "cuMemcpyHtoDAsync", "cuMemcpyDtoDAsync", "cuMemsetD32Async",
        "cuStreamDestroy", "cuStreamWaitEvent", "cuEventDestroy", "cuEventRecord",
        "cuEventSynchronize", "cuEventQuery", "cuEventElapsedTime", "cuModuleUnload",
        // For the one kernel that wants more shared memory; in doctor and bench; for errors.
        "cuFuncSetAttribute", "cuFuncGetAttribute", "cuOccupancyMaxActiveBlocks",
        "cuGetErrorName", "cuGetErrorString", "cublasDestroy", "cublasGetVersion",
        "cublasGemmStridedBatchedEx", "nvrtcDestroyProgram", "nvrtcGetCubinSize", "nvrtcGetCubin",
        "nvrtcGetLogSize", "nvrtcGetLog", "nvrtcGetErrorString",
    ];

    [TestCase(OutOfMemory)]
    [TestCase(Unknown)]
    public void WeightsThatCannotBePageLockedComeFromOrdinaryMemory(int code)
    {
        var stub = new StubCuda();
        using OpenDevice opened = stub.Devices.Open(_arguments);
        var device = (CudaDevice)opened.Device;
        StubCuda.Break(stub.Driver, nameof(CudaDriverApi.MemHostAlloc), code);
        var blocks = new StreamedBlock[4];
        var weights = new Tensor[4];
        for (int i = 0; i < blocks.Length; i++)
        {
            blocks[i] = device.BeginStreamed(0);
            weights[i] = device.Allocate(new Spec(DType.F32, new Shape(3)), "w");
            device.WriteFloats(weights[i], [i, 10 + i, 20 + i]);
            blocks[i].End();
        }

        Assert.That(device.PageableBytes, Is.Positive.And.EqualTo(device.StreamedBytes));
        Assert.That(opened.Pageable, Does.Contain("cannot be page-locked"));
        foreach (int i in (int[])[0, 1, 2, 3, 2, 1, 0])
        {
            blocks[i].Acquire(backward: false);
            Assert.That(device.ReadFloats(weights[i]), Is.EqualTo([i, 10 + i, 20 + i]));
            blocks[i].Release();
        }
    }

    [TestCase(true, "a kernel gives 0, expected 1")]
    [TestCase(false, "a product gives 0, expected 8")]
    public void ADeviceThatComputesZerosIsNotUsed(bool kernel, string expected)
    {
        var stub = new StubCuda();
        if (kernel) StubCuda.Break(stub.Driver, nameof(CudaDriverApi.LaunchKernel), 0);
        else StubCuda.Break(stub.Cublas, nameof(CublasApi.GemmEx), 0);
        Assert.That(() => stub.Devices.Open(_arguments), Throws.TypeOf<InputException>()
            .With.Message.Contains($"Stub does not compute: {expected}"));
    }

    [TestCase(new[] { -1, -1, 0, 0 })]
    [TestCase(new[] { 1, 0, 7, -5 })]
    [TestCase(new[] { 0x7fc00000, 3, 4, 5 })]
    public void GarbageInTheFaultWordsIsADamagedDevice(int[] words) =>
        Assert.That(KernelFaults.Describe(words), Is.TypeOf<CudaException>()
            .With.Message.Contains("the card's memory or its driver is damaged"));

    [Test]
    public void AKeptModuleThatTheDriverRefusesIsMadeAnewOnce()
    {
        var stub = new StubCuda();
        string cache = Path.Combine(_folder, "cache");
        DeviceSource devices = stub.Devices with { Cache = cache };
        devices.Open(_arguments).Dispose();
        string file = Directory.GetFiles(cache).Single();
        var kept = new ModuleCache(cache);
        kept.Write(Path.GetFileName(file), "refused"u8.ToArray());
        unsafe
        {
            stub.Driver.ModuleLoadDataEx = &RefuseOther;
        }

        devices.Open(_arguments).Dispose();
        Assert.That(kept.Read(Path.GetFileName(file)), Is.EqualTo("ptx\0"u8.ToArray()));
    }

    [UnmanagedCallersOnly]
    private static unsafe int RefuseOther(
        nint* module, void* image, uint count, int* names, void** values)
    {
        *module = 1;
        return *(byte*)image == 'p' ? 0 : 218;
    }

    [Test]
    public void TheCacheIsItsOwnersAloneAndKeepsFewFiles()
    {
        if (OperatingSystem.IsWindows()) return;
        string folder = Path.Combine(_folder, "a", "kernels");
        Directory.CreateDirectory(folder);
        File.SetUnixFileMode(folder, (UnixFileMode)511);
        var cache = new ModuleCache(folder);
        for (int i = 0; i < 40; i++) cache.Write(Name(i), [1, 2, (byte)i]);
        Assert.That(File.GetUnixFileMode(folder), Is.EqualTo((UnixFileMode)448));
        Assert.That(Directory.GetFiles(folder), Has.Length.EqualTo(24));
        Assert.That(cache.Read(Name(39)), Is.EqualTo(new byte[] { 1, 2, 39 }));
        string killed = Path.Combine(folder, $"{Name(1)}.77.0123"), young = killed + "4";
        File.WriteAllText(killed, "");
        File.WriteAllText(young, "");
        File.SetLastWriteTimeUtc(killed, DateTime.UtcNow.AddHours(-2));
        File.WriteAllText(Path.Combine(folder, "mine.txt"), "");
        // A name that cannot be taken: nothing of it is left.
        Directory.CreateDirectory(Path.Combine(folder, Name(99)));
        cache.Write(Name(99), [1]);
        Assert.That(Directory.GetFiles(folder).Where(f =>
            f.Contains(".ptx.", StringComparison.Ordinal)), Is.EqualTo([young]));
        Assert.That(File.Exists(Path.Combine(folder, "mine.txt")));
        Assert.That(File.Exists(killed), Is.False);
    }

    [Test]
    public void APipeOrALinkInTheCachesPlaceIsNotOpened()
    {
        var cache = new ModuleCache(_folder);
        using (var made = System.Diagnostics.Process.Start("mkfifo", [Path.Combine(_folder, Name(1))]))
            made.WaitForExit();
        Assert.That(cache.Read(Name(1)), Is.Null);
        cache.Write(Name(1), [1]);
        Assert.That(cache.Read(Name(1)), Is.EqualTo(new byte[] { 1 }));
        cache.Write(Name(2), [2]);
        File.Move(Path.Combine(_folder, Name(2)), Path.Combine(_folder, "elsewhere"));
        File.CreateSymbolicLink(Path.Combine(_folder, Name(2)), Path.Combine(_folder, "elsewhere"));
        Assert.That(cache.Read(Name(2)), Is.Null, "whose file a link leads to is not asked");
        // Root's own, for anyone but root; /proc has no file of ours for root.
        Assert.That(new ModuleCache("/etc").Read("passwd"), Is.Null);
    }

    // A library that was cut would end the process when it is mapped.
    [TestCase(0)]
    [TestCase(70)]
    [TestCase(5000)]
    public void ALibraryThatWasCutIsNamed(int bytes)
    {
        string library = Directory.GetFiles(
            Path.GetDirectoryName(typeof(object).Assembly.Location)!, "libclrjit.so").Single();
        byte[] whole = File.ReadAllBytes(library);
        string file = Path.Combine(_folder, "libcuda.so.1");
        File.WriteAllBytes(file, whole[..bytes]);
        Assert.That(Refusal(), Does.StartWith("cuda: driver cannot be used: ")
            .And.Contain($"{file} has {bytes:N0} bytes").And.EndWith("install it anew"));
        File.WriteAllBytes(file, whole);
        Assert.That(Refusal(), Does.Contain("has no entry point cuInit"), "loaded");
    }

    [Test]
    public void ALibraryThatCannotBeLoadedHasTheLoadersReason()
    {
        string library = Directory.GetFiles(
            Path.GetDirectoryName(typeof(object).Assembly.Location)!, "libclrjit.so").Single();
        byte[] other = File.ReadAllBytes(library);
        // e_machine: no processor that there is.
        (other[18], other[19]) = (0xfe, 0x7f);
        File.WriteAllBytes(Path.Combine(_folder, "libcuda.so.1"), other);
        Assert.That(Refusal(), Does.Match("cannot be loaded: .*(wrong ELF|invalid ELF|cannot open)")
            .And.Not.Contain("\n"));
    }

    private string Refusal()
    {
        var search = new CudaSearch(
            name => name == CudaSearch.OverrideVariable ? _folder : null, onlyOverride: true);
        return Assert.Throws<CudaUnavailableException>(() => CudaDriverApi.Load(search))!.Message;
    }

    private static string Name(int number) =>
        Convert.ToHexStringLower(SHA256.HashData(BitConverter.GetBytes(number))) + ".ptx";

    private static string[] Digests(string folder) => [.. Directory.GetFiles(folder).Order()
        .Select(f => f + Convert.ToHexString(SHA256.HashData(File.ReadAllBytes(f))))];

    /// <summary>A screen that does something when a text appears on it.</summary>
    private sealed class At(string text, Action action) : StringWriter
    {
        private bool _done;

        public override void Flush()
        {
            if (_done || !ToString().Contains(text, StringComparison.Ordinal)) return;
            _done = true;
            action();
        }
    }
}
