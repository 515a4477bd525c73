using System.Numerics.Tensors;
using System.Runtime.InteropServices;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Export;

/// <summary>How adapters become one, under PEFT's names.</summary>
public enum Combination { Cat, Svd, Linear }

/// <summary>What `cpmx combine` was asked for.</summary>
/// <param name="Adapters">The adapters' folders.</param>
/// <param name="Weights">One for each.</param>
/// <param name="Kind">How.</param>
/// <param name="Rank">Of svd's result; null takes the largest rank given.</param>
/// <param name="Out">The folder to make.</param>
public sealed record CombineRequest(
    IReadOnlyList<string> Adapters, IReadOnlyList<double> Weights, Combination Kind, int? Rank,
    string Out);

/// <summary>
/// `cpmx combine`: a weighted sum of adapters as one, by the rules of PEFT's add_weighted_adapter,
/// which needs no model. The result has scale 1 (lora_alpha is r). With w = weight * scale of each:
/// cat stacks [w A] and [B]; svd keeps the largest singular values of the sum of w B A, A = Vt, B =
/// U diag(s); linear sums sqrt|w| A, with w's sign, and sqrt|w| B. Where PEFT is wrong (svd scales
/// twice in 0.14, use_rslora and rank_pattern of the first adapter stay) the sum is what the
/// weights say. Left out are the kinds that drop entries of A and B (ties, dare, magnitude_prune).
/// </summary>
public static class CombineRun
{
    private const string Prefix = AdapterLayout.Prefix, EndA = ".lora_A.weight",
        EndB = ".lora_B.weight";

    /// <exception cref="InputException">The adapters cannot be combined.</exception>
    /// <exception cref="RunException">The result cannot be written.</exception>
    public static void Run(CombineRequest request, TextWriter output)
    {
        var members = new List<Member>();
        try
        {
            for (int i = 0; i < request.Adapters.Count; i++)
                members.Add(Member.Open(request.Adapters[i], request.Weights[i]));
            if (request.Rank is not null && request.Kind != Combination.Svd)
                throw new InputException("combine: --rank is svd's; leave it out, or give --kind "
                    + "svd");
            List<string> modules = [.. members.SelectMany(m => m.Ranks.Keys).Distinct()];
            int rank = request.Kind switch
            {
                Combination.Cat => members.Sum(m => m.Ranks.Values.Max()),
                _ => request.Rank ?? members.Max(m => m.Ranks.Values.Max()),
            };
            var made = new Dictionary<string, Pair>();
            foreach (string module in modules)
            {
                List<Pair> parts = [.. members.Where(m => m.Ranks.ContainsKey(module))
                    .Select(m => m.Read(module))];
                MustFit(module, parts, request.Kind);
                made[module] = request.Kind switch
                {
                    Combination.Cat => Cat(parts),
                    Combination.Linear => Linear(parts),
                    _ => Svd(parts, rank, module),
                };
            }

            AdapterConfig config = Config(members, modules, rank);
            List<TensorToSave> tensors = [.. modules.SelectMany(
                module => made[module].ToSave(Prefix + module, rank))];
            using NewFolder folder = NewFolder.Create(request.Out, tensors.Sum(t => t.Bytes));
            AdapterFile.Write(folder.Path, config, tensors);
            folder.Place();
            output.WriteLine($"{members.Count} adapters, combined by "
                + $"{TrainKeys.SnakeCase(request.Kind.ToString())}: rank {rank} on {modules.Count} "
                + $"modules, in {request.Out}");
        }
        finally
        {
            foreach (Member member in members) member.Dispose();
        }
    }

    // Modules chosen in different ways are named one by one.
    private static AdapterConfig Config(List<Member> members, List<string> modules, int rank)
    {
        AdapterConfig first = members[0].Config;
        foreach (Member member in members)
            if ($"{member.Config.LayerReplication}" != $"{first.LayerReplication}")
                throw new InputException("combine: the adapters run different layers "
                    + $"(layer_replication {first.LayerReplication} and "
                    + $"{member.Config.LayerReplication})");
        bool plain = members.TrueForAll(m => m.Config.Exclude is null
            && m.Config.LayersToTransform is null && m.Config.Targets.Pattern is not null);
        // A pattern of ms-swift's matches what stands around layers too, which PEFT refuses.
        bool wide = members.Exists(m => m.Config.Targets.Pattern is not null
            && modules.Exists(name =>
                m.Config.Targets.Matches(name[..Math.Max(0, name.LastIndexOf('.'))])));
        TargetModules targets = wide ? new TargetModules("")
            : members.TrueForAll(m => Choice(m.Config) == Choice(first))
            ? first.Targets
            : new TargetModules(plain
                ? string.Join('|', members.Select(m => $"({m.Config.Targets.Pattern})"))
                : "");
        bool named = targets.Pattern == "";
        return first with
        {
            Rank = rank,
            Alpha = rank,
            RankPattern = NumbersByName.None,
            AlphaPattern = NumbersByName.None,
            UseRslora = false,
            Start = new LoraStart("true"),
            Targets = named ? new TargetModules(modules) : targets,
            Exclude = named ? null : first.Exclude,
            LayersToTransform = named ? null : first.LayersToTransform,
            LayersPattern = named ? [] : first.LayersPattern,
        };

        static string Choice(AdapterConfig config) => $"{config.Targets} {config.Exclude} "
            + $"{string.Join(',', config.LayersToTransform ?? [])} "
            + string.Join(',', config.LayersPattern);
    }

    private static void MustFit(string module, List<Pair> parts, Combination kind)
    {
        Pair first = parts[0];
        foreach (Pair part in parts)
        {
            if ((part.Inputs, part.Outputs) != (first.Inputs, first.Outputs))
                throw new InputException($"combine: {module} is [{first.Outputs}, {first.Inputs}] "
                    + $"in {first.Place} and [{part.Outputs}, {part.Inputs}] in {part.Place}: they "
                    + "are adapters of different models");
            if (kind == Combination.Linear && part.Rank != first.Rank)
                throw new InputException($"combine: {module} has rank {first.Rank} in "
                    + $"{first.Place} "
                    + $"and {part.Rank} in {part.Place}; linear needs one rank: take --kind cat or "
                    + "svd");
        }
    }

    private static Pair Cat(List<Pair> parts)
    {
        int rank = parts.Sum(p => p.Rank), outputs = parts[0].Outputs, inputs = parts[0].Inputs;
        float[] a = new float[rank * inputs], b = new float[outputs * rank];
        int at = 0;
        foreach (Pair part in parts)
        {
            TensorPrimitives.Multiply(part.A, (float)part.Weight, a.AsSpan(at * inputs));
            for (int row = 0; row < outputs; row++)
                part.B.AsSpan(row * part.Rank, part.Rank).CopyTo(b.AsSpan((row * rank) + at));
            at += part.Rank;
        }

        return parts[0] with { Rank = rank, A = a, B = b };
    }

    private static Pair Linear(List<Pair> parts)
    {
        float[] a = new float[parts[0].A.Length], b = new float[parts[0].B.Length];
        foreach (Pair part in parts)
        {
            double root = Math.Sqrt(Math.Abs(part.Weight));
            TensorPrimitives.MultiplyAdd(
                part.A, (float)(Math.Sign(part.Weight) * root), a, a);
            TensorPrimitives.MultiplyAdd(part.B, (float)root, b, b);
        }

        return parts[0] with { A = a, B = b };
    }

    // B = Qb^T Lb^T and A = La Qa for all side by side: the values are those of Lb^T La.
    private static Pair Svd(List<Pair> parts, int rank, string module)
    {
        Pair all = Cat(parts);
        int count = all.Rank;
        if (count > Math.Min(all.Inputs, all.Outputs))
            throw new InputException($"combine: the ranks of {module} [{all.Outputs}, "
                + $"{all.Inputs}] "
                + $"sum to {count}, more than it has: combine fewer at a time, or take --kind cat");
        double[] right = [.. all.A.Select(v => (double)v)], left = new double[all.B.Length];
        for (int i = 0; i < all.Outputs; i++)
            for (int k = 0; k < count; k++) left[(k * all.Outputs) + i] = all.B[(i * count) + k];
        double[] lowerA = Factorisation.Lq(right, count, all.Inputs);
        double[] lowerB = Factorisation.Lq(left, count, all.Outputs);
        var core = new double[count * count];
        for (int i = 0; i < count; i++)
            for (int j = 0; j < count; j++)
                TensorPrimitives.MultiplyAdd(lowerA.AsSpan(i * count, count),
                    lowerB[(i * count) + j], core.AsSpan(j * count, count),
                    core.AsSpan(j * count, count));
        var (ut, s, vt) = Factorisation.Svd(core, count);
        int kept = Math.Min(rank, count);
        float[] a = new float[kept * all.Inputs], b = new float[all.Outputs * kept];
        for (int k = 0; k < kept; k++)
            for (int from = 0; from < count; from++)
            {
                double u = s[k] * ut[(k * count) + from], v = vt[(k * count) + from];
                for (int i = 0; i < all.Inputs; i++)
                    a[(k * all.Inputs) + i] += (float)(v * right[(from * all.Inputs) + i]);
                for (int i = 0; i < all.Outputs; i++)
                    b[(i * kept) + k] += (float)(u * left[(from * all.Outputs) + i]);
            }

        return all with { Rank = kept, A = a, B = b };
    }

    /// <summary>One module's A[Rank, Inputs] and B[Outputs, Rank], times Weight.</summary>
    private sealed record Pair(
        string Place, int Rank, int Inputs, int Outputs, double Weight, float[] A, float[] B)
    {
        // Smaller ranks are filled up with zeros.
        public IEnumerable<TensorToSave> ToSave(string name, int rank)
        {
            yield return new TensorToSave(name + EndA, DType.F32, new Shape(rank, Inputs), stream =>
            {
                stream.Write(MemoryMarshal.AsBytes<float>(A));
                stream.Write(new byte[(rank - Rank) * Inputs * sizeof(float)]);
            });
            var shape = new Shape(Outputs, rank);
            yield return new TensorToSave(name + EndB, DType.F32, shape, stream =>
            {
                var row = new float[rank];
                for (int i = 0; i < Outputs; i++)
                {
                    B.AsSpan(i * Rank, Rank).CopyTo(row);
                    stream.Write(MemoryMarshal.AsBytes<float>(row));
                }
            });
        }
    }

    private sealed class Member : IDisposable
    {
        private readonly AdapterFile _file;
        private readonly double _weight;
        private readonly Dictionary<string, StoredTensor> _tensors;

        private Member(AdapterFile file, double weight)
        {
            (_file, _weight) = (file, weight);
            _tensors = file.Tensors;
            foreach (var (name, tensor) in file.Tensors)
            {
                tensor.MustBeFinite(DType.F32);
                if (name.EndsWith(EndB, StringComparison.Ordinal)
                    || name.EndsWith(AdapterFile.CopyEnd, StringComparison.Ordinal)) continue;
                string module = name.StartsWith(Prefix, StringComparison.Ordinal)
                    && name.EndsWith(EndA, StringComparison.Ordinal)
                    && tensor.Sizes.Length == 2
                    ? name[Prefix.Length..^EndA.Length] : throw new InputException(
                        $"{tensor.Place}: only A and B of linear layers can be combined, not what "
                        + "was trained beside them");
                if (!_tensors.TryGetValue(Prefix + module + EndB, out var b) || b.Sizes.Length != 2
                    || b.Sizes[1] != tensor.Sizes[0])
                    throw new InputException($"{tensor.Place} {tensor.SizesText} has no "
                        + $"{module}{EndB} of the same rank beside it");
                Ranks.Add(module, tensor.Shape[0]);
            }

            if (Ranks.Count == 0) throw new InputException($"{file.Directory}: has no tensors");
        }

        public AdapterConfig Config => _file.Config;

        public Dictionary<string, int> Ranks { get; } = [];

        public static Member Open(string folder, double weight)
        {
            AdapterFile file = AdapterFile.Open(folder);
            try
            {
                if (file.Config.UseDora)
                    throw new InputException($"{folder}: has magnitudes (use_dora), which have no "
                        + "sum: put the adapters into the model one after the other with cpmx "
                        + "merge");
                return new Member(file, weight);
            }
            catch
            {
                file.Dispose();
                throw;
            }
        }

        public Pair Read(string module)
        {
            StoredTensor a = _tensors[Prefix + module + EndA], b = _tensors[Prefix + module + EndB];
            int rank = a.Shape[0];
            AdapterConfig config = Config;
            if (rank != config.RankOf(module))
                throw new InputException($"{a.Place} {a.SizesText}: expected rank "
                    + $"{config.RankOf(module)}, as {AdapterConfig.FileName} says");
            return new Pair(_file.Directory, rank, a.Shape[1], b.Shape[0],
                _weight * config.ScaleOf(module), a.ToFloats(), b.ToFloats());
        }

        public void Dispose() => _file.Dispose();
    }
}
