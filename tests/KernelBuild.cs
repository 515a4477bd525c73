using System.Diagnostics;
using System.Text;
using System.Text.RegularExpressions;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What NVIDIA's assembler made of one kernel for one architecture: resources as `ptxas -v` gives
/// them, instructions as nvdisasm lists them.
/// </summary>
internal sealed record KernelBuild(string Kernel, DType Storage, int Architecture)
{
    /// <summary>The launch bound, or the 256 threads that grids without one have.</summary>
    public int Threads { get; init; }

    public int Registers { get; init; }

    public int SharedBytes { get; init; }

    public int StackBytes { get; init; }

    public int SpillStores { get; init; }

    public int SpillLoads { get; init; }

    /// <summary>Instructions by name, with their modifiers.</summary>
    public Dictionary<string, int> Instructions { get; } = [];

    /// <summary>
    /// Instructions of this name, whatever their modifiers; all of those given must be there.
    /// </summary>
    public int Count(string name, params string[] modifiers) => Instructions
        .Where(i => Split(i.Key) is var parts && parts[0] == name && modifiers.All(parts.Contains))
        .Sum(i => i.Value);

    private static string[] Split(string instruction) => instruction.Split('.');
}

/// <summary>
/// kernels.cu through NVRTC, ptxas and nvdisasm, as a user's driver would see it: PTX of compute_80
/// without source lines, then machine code for each architecture.
/// </summary>
internal static partial class KernelBuilds
{
    private const int DefaultThreads = 256;

    /// <summary>Why there are none on this machine; null where the tools are.</summary>
    public static string? Missing =>
        CudaTools.Nvrtc is null ? "NVRTC is not here"
        : !File.Exists(Tool("ptxas")) ? $"{Tool("ptxas")} is not here"
        : !File.Exists(Tool("nvdisasm")) ? $"{Tool("nvdisasm")} is not here"
        : null;

    /// <summary>The compilers' versions, without which numbers mean nothing.</summary>
    public static string Versions()
    {
        (int major, int minor) = new ModuleCompiler(CudaTools.Nvrtc!, cache: null).Version;
        Match ptxas = Release().Match(Execute("ptxas", "--version"));
        return $"NVRTC {major}.{minor}, ptxas {ptxas.Groups[1].Value}";
    }

    /// <summary>
    /// All kernels of each storage type on each architecture, in the order of their names.
    /// </summary>
    public static KernelBuild[] Make(DType[] storages, int[] architectures)
    {
        string folder = Directory.CreateTempSubdirectory("cpmx-budget").FullName;
        try
        {
            foreach (DType storage in storages)
                foreach (int architecture in architectures.DistinctBy(SmallShared))
                    File.WriteAllBytes(
                        PtxFile(folder, storage, architecture), Ptx(storage, architecture));
            return
            [
                .. storages.SelectMany(s => architectures.Select(a => (s, a))).AsParallel()
                    .SelectMany(each => Assemble(folder, each.s, each.a))
                    .OrderBy(b => b.Kernel, StringComparer.Ordinal).ThenBy(b => b.Storage)
                    .ThenBy(b => b.Architecture),
            ];
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    /// <summary>Whether blocks of the architecture have tiles for less shared memory.</summary>
    public static bool SmallShared(int architecture) => architecture is not (80 or 90);

    private static byte[] Ptx(DType storage, int architecture)
    {
        byte[] text = new ModuleCompiler(CudaTools.Nvrtc!, cache: null)
            .Compile(CudaKernels.Source, "kernels.cu", new(storage, 80)
            {
                SmallShared = SmallShared(architecture),
            });
        return text[..^1];
    }

    private static string PtxFile(string folder, DType storage, int architecture) =>
        Path.Combine(folder, $"{storage}{(SmallShared(architecture) ? "-small" : "")}.ptx");

    private static KernelBuild[] Assemble(string folder, DType storage, int architecture)
    {
        string ptx = PtxFile(folder, storage, architecture), cubin = $"{ptx}.{architecture}.cubin";
        string usage = Execute("ptxas", "-v", $"-arch=sm_{architecture}", ptx, "-o", cubin);
        var builds = new Dictionary<string, KernelBuild>();
        foreach (Match m in Usage().Matches(usage))
        {
            int Number(string group) =>
                m.Groups[group] is { Success: true } g ? int.Parse(g.Value) : 0;
            builds[m.Groups["name"].Value] = new(m.Groups["name"].Value, storage, architecture)
            {
                StackBytes = Number("stack"),
                SpillStores = Number("stores"),
                SpillLoads = Number("loads"),
                Registers = Number("registers"),
                SharedBytes = Number("shared"),
            };
        }

        foreach (Match m in Bounds().Matches(File.ReadAllText(ptx)))
        {
            string name = m.Groups[1].Value;
            int threads = m.Groups[2].Success ? int.Parse(m.Groups[2].Value) : DefaultThreads;
            builds[name] = builds[name] with { Threads = threads };
        }

        Dictionary<string, int>? counts = null;
        foreach (string line in Execute("nvdisasm", "-c", cubin).Split('\n'))
        {
            if (Function().Match(line) is { Success: true } function)
                counts = builds[function.Groups[1].Value].Instructions;
            else if (Instruction().Match(line) is { Success: true } m && counts is not null)
                counts[m.Groups[1].Value] = counts.GetValueOrDefault(m.Groups[1].Value) + 1;
        }

        return [.. builds.Values];
    }

    private static string Tool(string name) => Path.Combine(CudaTools.Folder, "bin", name);

    // Both streams: ptxas writes its report to the second.
    private static string Execute(string tool, params string[] arguments)
    {
        var start = new ProcessStartInfo(Tool(tool), arguments)
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        using Process process = Process.Start(start)!;
        var errors = new StringBuilder();
        process.ErrorDataReceived += (_, line) => errors.AppendLine(line.Data);
        process.BeginErrorReadLine();
        string output = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        return process.ExitCode == 0 ? output + errors
            : throw new AssertionException(
                $"{tool} {string.Join(' ', arguments)}: {output}{errors}");
    }

    [GeneratedRegex(@"release [\d.]+, (V[\d.]+)")]
    private static partial Regex Release();

    [GeneratedRegex(
        @"Function properties for (?<name>\w+)\s+(?<stack>\d+) bytes stack frame, " +
        @"(?<stores>\d+) bytes spill stores, (?<loads>\d+) bytes spill loads\s+" +
        @"ptxas info\s+: Used (?<registers>\d+) registers(?:[^\n]*?(?<shared>\d+) bytes smem)?")]
    private static partial Regex Usage();

    [GeneratedRegex(@"\.entry (\w+)\([^)]*\)\s*(?:\.maxntid (\d+), 1, 1)?")]
    private static partial Regex Bounds();

    [GeneratedRegex(@"^\.text\.(\w+):")]
    private static partial Regex Function();

    [GeneratedRegex(@"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)")]
    private static partial Regex Instruction();
}
