using System.Diagnostics;
using System.IO.Compression;
using System.Security.Cryptography;
using System.Text;
using System.Text.RegularExpressions;
using MiniCpmNative.GpuEmulator.Driver;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// PTX of an NVRTC that is not to be had where the tests run, as a committed file. Its first line
/// holds the hash of what it was made of, the next ones what ptxas says of each kernel. How to make
/// it anew stands in tests/GpuEmulator/README.md.
/// </summary>
/// <param name="Name">Of the file.</param>
/// <param name="Source">What it is made of.</param>
/// <param name="Options">How.</param>
internal sealed partial record CommittedPtx(string Name, string Source, ModuleOptions Options)
{
    /// <summary>Of kernels_sm90a.cu, which NVRTC knows from 12 on.</summary>
    public static CommittedPtx Hopper { get; } = new("kernels_sm90a", CudaKernels.HopperSource,
        new(DType.BF16, 90, LineInfo: true) { Specific = true });

    /// <summary>
    /// Of kernels.cu for compute capability 12.0: NVRTC has another compiler inside for it, with
    /// instructions of its own.
    /// </summary>
    public static CommittedPtx Blackwell { get; } = new("kernels_sm120", CudaKernels.Source,
        new(DType.BF16, 120) { SmallShared = true });

    public string File { get; } = Path.Combine(ReferenceFile.Root, "ptx", Name + ".ptx.br");

    /// <summary>Of the source and of the shared numbers that it names.</summary>
    public string Hash()
    {
        string[] named = [.. Options.Arguments().Where(a =>
            a.StartsWith("-D", StringComparison.Ordinal) && Source.Contains(a[2..a.IndexOf('=')]))];
        return Convert.ToHexStringLower(SHA256.HashData(
            Encoding.UTF8.GetBytes($"{string.Join(' ', named)}\n{Source}")));
    }

    /// <summary>Whether it is of the source as it is.</summary>
    public bool IsCurrent() =>
        Read().StartsWith($"// of {Hash()}, by NVRTC ", StringComparison.Ordinal);

    /// <summary>The file: the lines told of above, then PTX.</summary>
    public string Read()
    {
        using FileStream file = System.IO.File.OpenRead(File);
        using var unpacked = new BrotliStream(file, CompressionMode.Decompress);
        return new StreamReader(unpacked).ReadToEnd();
    }

    /// <summary>What ptxas says of each kernel, by its name.</summary>
    public Dictionary<string, string> Usage() => Read().Split('\n').Skip(1)
        .TakeWhile(line => line.StartsWith("// ", StringComparison.Ordinal)
            && line.Contains(" registers, ", StringComparison.Ordinal))
        .ToDictionary(line => line[3..line.IndexOf(':')], line => line[(line.IndexOf(':') + 2)..]);

    /// <summary>On an emulated device.</summary>
    public CudaModule Load(CudaContext context) => CudaModule.LoadPtx(
        context, Encoding.UTF8.GetBytes(Read() + "\0"), Source, DType.BF16);

    /// <summary>Makes the file by an NVRTC library and the ptxas beside it.</summary>
    public void Write(string library)
    {
        string folder = Path.GetDirectoryName(library)!;
        var search = new CudaSearch(
            name => name == CudaSearch.OverrideVariable ? folder : null,
            onlyOverride: true);
        var compiler = new ModuleCompiler(NvrtcApi.Load(search, 0), cache: null);
        byte[] ptx = compiler.Compile(Source, Name + ".cu", Options);
        using var packed = new MemoryStream();
        using (var brotli = new BrotliStream(
            packed, new BrotliCompressionOptions { Quality = 11 }, leaveOpen: true))
        {
            brotli.Write(Encoding.UTF8.GetBytes($"// of {Hash()}, by NVRTC {compiler.Version.Major}"
                + $".{compiler.Version.Minor}\n{Usage(Path.Combine(folder, "ptxas"), ptx)}"));
            brotli.Write(ptx.AsSpan().TrimEnd((byte)0));
        }

        System.IO.File.WriteAllBytes(File, packed.ToArray());
    }

    // "// NAME: N registers, N bytes of stack, N and N spilled" of each kernel.
    private string Usage(string ptxas, byte[] ptx)
    {
        string file = Path.GetTempFileName();
        try
        {
            System.IO.File.WriteAllBytes(file, ptx[..^1]);
            string architecture = $"sm_{Options.Architecture}{(Options.Specific ? "a" : "")}";
            var start = new ProcessStartInfo(
                ptxas, [$"-arch={architecture}", "-v", file, "-o", file])
            {
                RedirectStandardError = true,
            };
            using Process process = Process.Start(start)!;
            string report = process.StandardError.ReadToEnd();
            process.WaitForExit();
            Assert.That(process.ExitCode, Is.Zero, report);
            Assert.That(report, Does.Not.Contain("serialized"), "products wait for each other");
            return string.Concat(Report().Matches(report).Select(m =>
                $"// {m.Groups[1].Value}: {m.Groups[5].Value} registers, {m.Groups[2].Value} bytes "
                + $"of stack, {m.Groups[3].Value} and {m.Groups[4].Value} spilled\n")
                .Order(StringComparer.Ordinal));
        }
        finally
        {
            System.IO.File.Delete(file);
        }
    }

    [GeneratedRegex(
        @"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        + @"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers")]
    private static partial Regex Report();
}

/// <summary>Kernels of sm_90a for the emulator: the committed file, or clang 19's.</summary>
internal static class HopperPtx
{
    /// <summary>Ignores the test where they cannot be had. Another source than the committed one
    /// goes through clang.</summary>
    public static CudaModule Load(CudaContext context, DeviceCompiler compiler, string? source)
    {
        if (compiler == DeviceCompiler.Nvrtc && source is null)
            return CommittedPtx.Hopper.Load(context);
        if (ClangNvrtc.HopperClang is null)
            Assert.Ignore("clang 19 is not installed: tests/install-cuda-tools.sh installs it");
        byte[] ptx = new ModuleCompiler(ClangNvrtc.Table(), cache: null).Compile(
            source ?? CudaKernels.HopperSource, "kernels_sm90a.cu", CommittedPtx.Hopper.Options);
        return CudaModule.LoadPtx(
            context, ptx, source ?? CudaKernels.HopperSource, DType.BF16);
    }
}

/// <summary>The committed PTX is that of the sources as they are.</summary>
[TestFixture]
public sealed class CommittedPtxTests
{
    private static readonly CommittedPtx[] s_all = [CommittedPtx.Hopper, CommittedPtx.Blackwell];

    [Test]
    public void TheCommittedPtxIsOfThisSource()
    {
        foreach (CommittedPtx each in s_all)
        {
            if (Environment.GetEnvironmentVariable("CPMX_UPDATE_PTX") is { Length: > 0 } library)
                each.Write(library);
            Assert.That(each.IsCurrent(), $"the source of {each.Name} or a number it shares has "
                + "changed: CPMX_UPDATE_PTX=LIBRARY of NVRTC 13 makes its PTX anew");
        }
    }

    // ptxas 13 has a few registers less for two kernels on sm_120 than they want.
    [Test]
    public void AlmostNothingSpills()
    {
        string[] spilling = ["attention_forward_128", "lora_down"];
        foreach (CommittedPtx each in s_all)
        {
            Dictionary<string, string> usage = each.Usage();
            Assert.That(usage.Keys, Is.EquivalentTo(
                KernelSignatures.Parse(each.Source, DType.BF16).Keys));
            foreach (var (kernel, line) in usage)
                Assert.That(line, Does.EndWith(
                    each == CommittedPtx.Blackwell && spilling.Contains(kernel)
                        ? ", 16 bytes of stack, 12 and 12 spilled"
                        : ", 0 bytes of stack, 0 and 0 spilled"), $"{each.Name} {kernel}");
        }
    }
}
