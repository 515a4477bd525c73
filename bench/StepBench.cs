using System.Diagnostics;
using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Bench;

/// <summary>
/// bench step: one LoRA training step of a small decoder in F32: forward, backward and AdamW,
/// adapters on q, k, v, o, everything else frozen, every position supervised. The shapes are those
/// of a plain PyTorch program, so that both can be timed in turn;
/// prints the best and the median of the steps.
/// </summary>
internal static class StepBench
{
    private const int Layers = 4, Width = 512, Heads = 8, Intermediate = 1408, Vocabulary = 8192;
    private const int Tokens = 512, Rank = 16;

    public static void Run(string[] args)
    {
        int threads = Option(args, "--threads", 2), steps = Option(args, "--steps", 8);
        using var step = new Step(threads);
        var seconds = new double[steps];
        for (int i = 0; i < steps; i++)
        {
            long allocated = GC.GetAllocatedBytesForCurrentThread();
            var clock = Stopwatch.StartNew();
            double loss = step.Run(i);
            seconds[i] = clock.Elapsed.TotalSeconds;
            allocated = GC.GetAllocatedBytesForCurrentThread() - allocated;
            Console.WriteLine(
                $"step {i} loss {loss:F4} {seconds[i] * 1e3:F1} ms, {allocated} managed bytes");
        }

        Array.Sort(seconds);
        Console.WriteLine($"BEST {seconds[0] * 1e3:F1} ms median {seconds[steps / 2] * 1e3:F1} ms  "
            + $"{Flops() / 1e9:F1} GF/step -> {Flops() / seconds[0] / 1e9:F1} GF/s");
    }

    // As the peer counts them: dense layers forward and dX, adapters with dA and dB too, attention
    // over the whole square.
    private static double Flops()
    {
        double dense = (Layers * ((4.0 * Width * Width) + (3.0 * Width * Intermediate)))
            + (Vocabulary * Width);
        double adapters = Layers * 4.0 * 2 * Rank * Width;
        return (2.0 * Tokens * ((dense * 2) + (adapters * 3)))
            + (Layers * 6.0 * 2 * Tokens * Tokens * Width);
    }

    internal static int Option(string[] args, string name, int otherwise)
    {
        int at = Array.IndexOf(args, name);
        return at >= 0 && at + 1 < args.Length ? int.Parse(args[at + 1]) : otherwise;
    }

    private sealed class Step : IDisposable
    {
        private readonly CpuDevice _device;
        private readonly Graph _graph;
        private readonly ParameterRanges _trainables;
        private readonly Decoder _decoder;
        private readonly BatchTensors _batch;
        private readonly Batch _rows = new();
        private readonly Optimizer _optimizer;
        private readonly BatchUpload _upload;

        public Step(int threads)
        {
            var decoder = new DecoderSpec(
                Vocabulary, Width, Intermediate, Layers, Heads, Heads, Width / Heads, 1e-6f,
                QkvBias: false, TiedHead: false, 10000, RopeScaling.None, Tokens);
            _device = new CpuDevice(threads);
            _graph = new Graph(_device);
            string folder = Directory.CreateTempSubdirectory("cpmx-bench-").FullName;
            try
            {
                Adapters adapters = WriteModel(folder);
                using var checkpoint = Checkpoint.Open(folder);
                _trainables = new ParameterRanges(_device, adapters.List.SelectMany(Parts));
                var weights =
                    new ModelWeights(_graph, checkpoint, DType.F32,
                        new() { Trainables = _trainables, Adapters = adapters });
                var scope = new ModuleScope(new ParameterTable.Builder(), weights);
                _decoder = new Decoder(decoder, scope.In("llm"), Recomputation.None);
                adapters.Initialise(_trainables, 1, new("true"), null, _ => []);
            }
            finally
            {
                Directory.Delete(folder, recursive: true);
            }

            _batch = new BatchTensors();
            _upload = new BatchUpload(_device);
            _optimizer = new Optimizer(_device, _trainables, new TrainArguments());
            Fill();
        }

        public double Run(int step)
        {
            _device.Random = new Randomness(1, (ulong)step, Dropout: true);
            _graph.ClearGradients();
            _upload.Run(_rows, [_batch, _decoder]);
            Tensor hidden = _decoder.Forward(_graph, _decoder.Embed(_graph, _batch.Tokens), null);
            Tensor loss = _decoder.Loss(_graph, hidden, _batch.LabelRows, _batch.Targets, []);
            Span<float> value = stackalloc float[1];
            _device.Read(loss, value);
            _graph.Backward(loss, 1.0 / Tokens);
            _graph.EndStep();
            _optimizer.Measure(Tensor.None);
            _optimizer.Step(1e-3);
            _optimizer.Updates++;
            return value[0] / Tokens;
        }

        public void Dispose() => _device.Dispose();

        private static IEnumerable<TunedTensor> Parts(Adapter adapter)
        {
            yield return new(
                Adapters.NameOfA(adapter.Module), new Shape(adapter.Rank, adapter.Inputs),
                DType.F32, true);
            yield return new(
                Adapters.NameOfB(adapter.Module), new Shape(adapter.Outputs, adapter.Rank),
                DType.F32, true);
        }

        private void Fill()
        {
            var random = new Random(2);
            _rows.Clear();
            for (int i = 0; i < Tokens; i++)
            {
                _rows.Tokens.Add(random.Next(Vocabulary));
                _rows.Positions.Add(i);
                _rows.LabelRows.Add(i);
                _rows.Targets.Add(random.Next(Vocabulary));
            }

            _rows.SequenceStarts.Add(Tokens);
            _rows.Samples = 1;
        }

        private static Adapters WriteModel(string folder)
        {
            var random = new Random(1);
            var tensors = new List<TensorToSave>();
            var adapters = new List<Adapter>();
            Matrix("llm.model.embed_tokens.weight", Vocabulary, Width);
            Matrix("llm.lm_head.weight", Vocabulary, Width);
            Ones("llm.model.norm.weight");
            for (int i = 0; i < Layers; i++)
            {
                string layer = $"llm.model.layers.{i}.";
                Ones(layer + "input_layernorm.weight");
                Ones(layer + "post_attention_layernorm.weight");
                foreach (string name
                    in (ReadOnlySpan<string>)["q_proj", "k_proj", "v_proj", "o_proj"])
                {
                    Matrix($"{layer}self_attn.{name}.weight", Width, Width);
                    adapters.Add(new Adapter(
                        $"{layer}self_attn.{name}", adapters.Count, Rank, 2, Width, Width));
                }

                Matrix(layer + "mlp.gate_proj.weight", Intermediate, Width);
                Matrix(layer + "mlp.up_proj.weight", Intermediate, Width);
                Matrix(layer + "mlp.down_proj.weight", Width, Intermediate);
            }

            SafetensorsWriter.Write(Path.Combine(folder, Checkpoint.SingleFile), tensors);
            return new Adapters(adapters, dropout: 0);

            void Matrix(string name, int rows, int cols)
            {
                var values = new float[rows * cols];
                for (int i = 0; i < values.Length; i++)
                    values[i] = (float)(((random.NextDouble() * 2) - 1) * Math.Sqrt(3.0 / cols));
                Add(name, new Shape(rows, cols), values);
            }

            void Ones(string name) =>
                Add(name, new Shape(Width), Enumerable.Repeat(1f, Width).ToArray());

            void Add(string name, Shape shape, float[] values) => tensors.Add(new TensorToSave(
                name, DType.F32, shape, stream => stream.Write(
                    System.Runtime.InteropServices.MemoryMarshal.AsBytes<float>(values))));
        }
    }
}
