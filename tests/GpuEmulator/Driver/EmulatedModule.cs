using MiniCpmNative.GpuEmulator.Machine;
using MiniCpmNative.GpuEmulator.Memory;
using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator.Driver;

/// <summary>A loaded module: its variables in device memory, its kernels assembled.</summary>
internal sealed class EmulatedModule
{
    private readonly Dictionary<string, Program> _programs = [];
    private readonly Dictionary<string, Allocation> _variables = [];

    /// <exception cref="PtxException">Names the line that is not known.</exception>
    public unsafe EmulatedModule(string ptx, DeviceMemory memory)
    {
        var module = PtxParser.Parse(ptx);
        foreach (var variable in module.Variables.Values.Where(v =>
            v.Space is Space.Global or Space.Const))
        {
            bool constant = variable.Space == Space.Const;
            var allocation = memory.Allocate(
                variable.Bytes, $"{(constant ? "constant" : "variable")} {variable.Name}", constant)
                ?? throw new PtxException($"no memory for {variable.Name}");
            var host = new Span<byte>(allocation.Host, variable.Bytes);
            host.Clear();
            variable.Initial?.CopyTo(host);
            new Span<byte>(allocation.State, variable.Bytes).Fill(255);
            _variables[variable.Name] = allocation;
        }
        foreach (var kernel in module.Kernels.Values)
            _programs[kernel.Name] = Assembler.Assemble(kernel, v =>
                _variables.TryGetValue(v.Name, out var place)
                    ? place.Start
                    : throw new PtxException($"{v.Name} is not defined"));
    }

    public Program? Find(string name) => _programs.GetValueOrDefault(name);

    public IEnumerable<string> Names => _programs.Keys;

    public void Unload(DeviceMemory memory)
    {
        foreach (var variable in _variables.Values) memory.Free(variable.Start);
    }
}
